"""Where the numbers of a product are: bits, swizzles, operands in shared memory, fragments in registers."""

import functools
import re

import numpy as np
import torch

SPANS = {0: 0, 1: 1, 2: 3, 3: 7}  # of a tensor map's swizzle: which of an address's bits 4 to 6 are changed
OF_DESCRIPTOR = {0: 0, 1: 3, 2: 2, 3: 1}  # the swizzle of a descriptor of a product's operand


@functools.cache
def bits_of(kind):
    """The bits of a type's name, such as s32 or bf16."""
    return int(re.search(r"\d+", kind)[0])


def swizzled(addresses, swizzle):
    """Where a byte of shared memory is kept: bits 4 to 6 are changed by bits 7 to 9, as many as the swizzle has."""
    return addresses ^ (((addresses >> 7) & SPANS[swizzle]) << 4)


def operand(shared, descriptor, size, depth, kind, across):
    """A product's operand [size, depth] in shared memory; ``across``: its rows, and not its depth, lie together."""
    at, swizzle, item = places(descriptor, size, depth, kind, across)
    values = np.ascontiguousarray(shared[swizzled(at, swizzle)[..., None] + np.arange(item)])
    return numbers(values.view(np.uint32 if item == 4 else np.uint16)[..., 0], kind)


def places(descriptor, size, depth, kind, across):
    """Where the numbers of an operand are, but for its swizzle; the swizzle, and the bytes of a number."""
    start, leading, stride = ((descriptor >> at & 0x3FFF) << 4 for at in (0, 16, 32))
    swizzle = OF_DESCRIPTOR[descriptor >> 62 & 3]
    item = 4 if kind == "tf32" else 2
    row, k = np.arange(size)[:, None], np.arange(depth)[None, :]
    width = 16 << swizzle  # bytes of a line
    if across:
        held = width // item
        at = start + row % held * item + row // held * leading + k % 8 * width + k // 8 * stride
    else:
        at = start + row // 8 * stride + row % 8 * width + k * item
        if swizzle == 0:
            at = start + row // 8 * stride + row % 8 * 16 + k * item // 16 * leading + k * item % 16
    return at, swizzle, item


def lines(descriptor, size, depth, kind, across):
    """The lines of shared memory, of 128 bytes each, that an operand is of."""
    return np.unique(places(descriptor, size, depth, kind, across)[0] // 128)


def numbers(bits, kind):
    """Bits as float32."""
    if kind == "tf32":
        return (bits & np.uint32(0xFFFFE000)).view(np.float32)
    return (
        bits.view(np.float16).astype(np.float32) if kind == "f16" else (bits.astype(np.uint32) << 16).view(np.float32)
    )


def fragment(registers, kind):
    """The left operand of a warp group's product [64, depth] from its 128 threads' four registers."""
    t = np.arange(128)
    row = 16 * (t // 32) + t % 32 // 4
    if kind == "tf32":
        whole = np.zeros((64, 8), np.float32)
        for r, bits in enumerate(registers):
            whole[row + 8 * (r % 2), t % 4 + 4 * (r // 2)] = numbers(bits, kind)
        return whole
    whole = np.zeros((64, 16), np.float32)
    for r, bits in enumerate(registers):
        pair = np.ascontiguousarray(bits).view(np.uint16).reshape(128, 2)
        for e in range(2):
            whole[row + 8 * (r % 2), t % 4 * 2 + e + 8 * (r // 2)] = numbers(pair[:, e].copy(), kind)
    return whole


@functools.cache
def places_of_sums(registers):
    """Rows and columns of a warp group's sums that its 128 threads have in so many registers each."""
    t, r = np.arange(128), np.arange(registers)[:, None]
    return 16 * (t // 32) + t % 32 // 4 + 8 * (r // 2 % 2), 8 * (r // 4) + t % 4 * 2 + r % 2


def rows_of_lanes(matrices, transposed):
    """What each lane gets of its warp's matrix [warps, 8, 8] of 16 bits: two neighbours of a row, or of a column."""
    lane = np.arange(32)
    if transposed:
        low, high = (matrices[:, lane % 4 * 2 + e, lane // 4] for e in range(2))
    else:
        low, high = (matrices[:, lane // 4, lane % 4 * 2 + e] for e in range(2))
    return (low.astype(np.uint32) | high.astype(np.uint32) << 16).ravel()


def rounded(x):
    """float32 to the bits of bfloat16, ties to even; NaN stays NaN."""
    return torch.from_numpy(np.ascontiguousarray(x)).to(torch.bfloat16).view(torch.uint16).numpy()
