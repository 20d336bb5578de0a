"""Convolutions that both suites run: of networks' forms and of any channels, and which kernels each is to launch."""

import torch

from fastens.ops import conv2d as op
from fastens.ops import conv2d_sum as sum_op
from fastens.ops.group_moments import group_moments
from fastens.program.block import ConvBlock

RAGGED = torch.tensor([0, 1, 1, 4])


def conv2d(*own, tiling="auto", backend="auto", **named):
    """The op of a block of its own fields in their order, and of any by name."""
    return op.conv2d(ConvBlock.of(*own, **named), tiling, backend)


def conv2d_sum(x, weight, bias, member_weights, *own, backend="auto", **named):
    return sum_op.conv2d_sum(ConvBlock.of(x, weight, bias, *own, **named), member_weights, backend)


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=torch.double).to(dtype)


def last(x):
    return x.contiguous(memory_format=torch.channels_last)


def in_double(value):
    if isinstance(value, dict):
        return {name: in_double(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [in_double(item) for item in value]
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def norm(x, num_groups, num_members, dtype=torch.float32):
    rows, channels = x.shape[:2]
    return {
        "moments": group_moments(x, num_groups, backend="reference"),
        "norm_weight": normal(num_members, channels, dtype=dtype),
        "norm_bias": normal(num_members, channels, dtype=dtype),
        "eps": 1e-3,
        "scale": normal(rows, channels, dtype=dtype),
        "shift": normal(rows, channels, dtype=dtype),
        "activation": "silu",
    }


def block(num_members, rows, channels, outputs, size, taps=3, stride=1, padding=1, dtype=torch.float32, groups=(4, 4)):
    """Everything that the op has: norm and activation, row bias, residual, factor, activation, moments."""
    x = last(2 * normal(rows, channels, *size, dtype=dtype) + 3)
    weight = normal(num_members, outputs, channels, taps, taps, dtype=dtype) / (taps * channels**0.5)
    out = [(n + 2 * padding - taps) // stride + 1 for n in size]
    arguments = (x, weight, normal(num_members, outputs, dtype=dtype), (stride, stride), (padding, padding), None)
    return arguments, {
        **norm(x, groups[0], num_members, dtype),
        "row_bias": normal(rows, outputs, dtype=dtype),
        "residual": last(normal(rows, outputs, *out, dtype=dtype)),
        "output_scale": 0.7,
        "output_activation": "silu",
        "num_groups": groups[1],
    }


def plain(num_members, rows, channels, outputs, size, dtype=torch.float32, offsets=None, stride=1, **options):
    x = normal(rows, channels, *size, dtype=dtype)
    weight = normal(num_members, outputs, channels, 3, 3, dtype=dtype) / (3 * channels**0.5)
    return (x, weight, None, (stride, stride), (1, 1), offsets), options


def straddling(num_members, rows, channels, outputs, parts, size, dtype=torch.float32, taps=3, offsets=None):
    """A block whose norm is of two images, by the moments of parts of its groups; the last group but one is of both.

    channels are those of x and of skip; parts are groups of the norm, and channels of what its moments are of.
    """
    own, beyond = channels
    arguments, options = block(
        num_members, rows, own + beyond, outputs, size, taps, padding=taps // 2, dtype=dtype, groups=(parts[0], 1)
    )
    x, *rest = arguments
    rest[-1] = offsets
    x, skip = last(x[:, :own]), last(x[:, own:])
    moments, skip_moments = (
        group_moments(image, image.shape[1] // parts[1], backend="reference") for image in (x, skip)
    )
    options |= {"moments": moments, "skip": skip, "skip_moments": skip_moments, "norm_groups": parts[0]}
    return (x, *rest), options


def beside(num_members, rows, channels, outputs, size, dtype=torch.float32, **options):
    """A plain convolution of two images."""
    (x, *rest), options = plain(num_members, rows, sum(channels), outputs, size, dtype, **options)
    return (x[:, : channels[0]], *rest), {**options, "skip": x[:, channels[0] :]}


def wide(call, num_groups):
    """A call with tiles of 256 output channels in 16 bits, and so many groups of the result."""
    arguments, options = call
    return arguments, {**options, "tiling": "wide", "num_groups": num_groups}


def masked(call, rows=None):
    """A call with a mask of each row, or of as many members, and bits beyond its channels."""
    (x, weight, *rest), options = call
    words = -(-weight.shape[2] // 32)
    bits = torch.randint(-(2**31), 2**31, (rows or len(x), *x.shape[2:], words))
    return (x, weight, *rest), {**options, "mask": bits.to(torch.int32), "mask_scale": 1 / 0.7}


# name -> what is called for a dtype, and the kernels that have to run for it
VARIANTS = {
    "block": (lambda d: block(3, 6, 20, 12, (5, 7), dtype=d, groups=(4, 3)), ["conv2d_kernel"]),
    "block of one member": (lambda d: block(1, 2, 8, 4, (4, 4), dtype=d, groups=(2, 1)), ["conv2d_kernel"]),
    "block of 17 members": (lambda d: block(17, 17, 4, 4, (2, 2), dtype=d, groups=(1, 2)), ["conv2d_kernel"]),
    "block with stride": (lambda d: block(2, 2, 16, 24, (9, 6), stride=2, dtype=d, groups=(4, 3)), ["conv2d_kernel"]),
    "block of several tiles": (lambda d: block(2, 2, 8, 20, (13, 11), dtype=d, groups=(2, 5)), ["conv2d_kernel"]),
    "block in split sums": (
        lambda d: block(1, 2, 72, 8, (3, 5), dtype=d, groups=(8, 2)),
        ["conv2d_kernel in splits"],
    ),
    "1x1 with padding and stride": (
        lambda d: block(2, 2, 7, 5, (5, 6), taps=1, stride=2, padding=1, dtype=d, groups=(7, 5)),
        ["conv2d_kernel"],
    ),
    "groups that are no power of two": (
        lambda d: block(2, 2, 6, 6, (4, 3), dtype=d, groups=(2, 2)),
        ["conv2d_kernel", "partial_kernel"],
    ),
    "many spans before": (
        lambda d: block(1, 1, 4, 2, (47, 46), taps=1, stride=16, padding=0, dtype=d, groups=(2, 1)),
        ["maps_kernel", "conv2d_kernel"],
    ),
    "space innermost": (lambda d: plain(5, 5, 3, 33, (5, 4), d), ["conv2d_kernel"]),
    "ragged": (lambda d: plain(3, 4, 6, 8, (4, 5), d, RAGGED, num_groups=2), ["conv2d_kernel"]),
    "shared": (lambda d: plain(3, 2, 3, 16, (5, 4), d, shared=True, num_groups=4), ["conv2d_kernel"]),
    "narrow": (lambda d: plain(2, 6, 5, 70, (3, 3), d, tiling="narrow"), ["conv2d_kernel"]),
    "wide": (lambda d: plain(1, 1, 5, 140, (3, 3), d, tiling="wide"), ["conv2d_kernel"]),
    "skip": (lambda d: beside(2, 4, (96, 33), 5, (3, 4), d, num_groups=5), ["conv2d_kernel"]),
    "skip of few channels": (lambda d: beside(5, 5, (20, 3), 6, (5, 4), d), ["conv2d_kernel"]),
    "skip and a norm that straddles": (
        lambda d: straddling(2, 4, (12, 6), 8, (3, 2), (5, 4), d),
        ["conv2d_kernel"],
    ),
    "wide, skip and a norm that straddles": (  # finished in smaller parts
        lambda d: wide(straddling(1, 1, (12, 6), 160, (3, 2), (3, 4), d), 20),
        ["conv2d_kernel"],
    ),
    "skip, ragged and one part a group": (
        lambda d: straddling(3, 4, (16, 32), 8, (12, 4), (3, 4), d, offsets=RAGGED),
        ["conv2d_kernel"],
    ),
    "skip and several spans": (lambda d: straddling(1, 1, (12, 6), 4, (3, 3), (13, 11), d, 1), ["conv2d_kernel"]),
    "skip and many parts": (
        lambda d: straddling(1, 2, (24, 12), 4, (1, 2), (3, 2), d),
        ["maps_kernel", "conv2d_kernel"],
    ),
    "masked": (lambda d: masked(block(2, 4, 8, 6, (5, 7), dtype=d, groups=(4, 3))), ["conv2d_kernel"]),
    "masked by member, nothing else": (lambda d: masked(plain(2, 4, 70, 6, (5, 3), d), 2), ["conv2d_kernel"]),
    "masked, ragged, with stride": (
        lambda d: masked(plain(3, 4, 33, 8, (4, 5), d, RAGGED, stride=2), 3),
        ["conv2d_kernel"],
    ),
    "masked skip": (lambda d: masked(beside(2, 4, (96, 40), 5, (3, 4), d)), ["conv2d_kernel"]),
    "masked skip of any channels": (
        lambda d: masked(straddling(2, 2, (36, 33), 8, (3, 1), (3, 4), d), 2),
        ["maps_kernel", "conv2d_kernel"],
    ),
    "skip and norm by each of split sums": (
        lambda d: straddling(2, 2, (138, 34), 8, (43, 2), (3, 5), d),
        ["conv2d_kernel in splits"],
    ),
    "skip in split sums": (
        lambda d: straddling(1, 2, (64, 33), 8, (1, 1), (3, 5), d),
        ["maps_kernel", "conv2d_kernel in splits"],
    ),
}
