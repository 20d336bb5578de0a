"""Ways of a convolution by kernels whose loads are tensor descriptors, and what those do not take."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastens.device import convolution_precision, device_of
from fastens.kernels._rows import interpreting
from fastens.ops._dispatch import KERNEL_DTYPES, missing_triton
from fastens.program.block import ConvBlock, Prologue
from fastens.reference._activation import activate

LINE = 16  # bytes that addresses and strides in descriptors are multiples of
BOX = 128  # bytes of channels that a box holds
TILE = 128  # places, and output channels, of an ordinary tile
TILINGS = ("tma 64x128", "tma 128x128", "tma 128x256")  # places by output channels


class Call(NamedTuple):
    """The arguments of the ways of ``conv2d``, in their order.

    Attributes:
        block: what is convolved, and how; ``padding`` is above and to the left.
        size: of the result's space: how many zeros are below and to the right follows from it.
        into: where the result is written; none for new memory.
        moments: where its moments are written, or none.
    """

    block: ConvBlock
    size: Sequence[int]
    into: Tensor | None = None
    moments: Tensor | None = None

    def written(self) -> tuple[Tensor, Tensor | None]:
        """The tensors that the kernel writes: the result, made here where none was given, and its moments or none."""
        return self.block.result(self.size) if self.into is None else self.into, self.moments


def prepared(block: ConvBlock) -> ConvBlock:
    """Return the block with its prologue applied in a pass of its own: normalised, or joined and activated."""
    x, before = block.x, block.prologue
    if block.begins_plain:
        return block
    if before.moments is None:
        whole = x if before.skip is None else torch.cat([x, before.skip], 1)
        y = activate(whole.contiguous(memory_format=torch.channels_last), before.activation)
    else:
        from fastens.kernels.group_norm import normalise

        size = (x.shape[0], block.weight.shape[2], *x.shape[2:])
        into = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        y = normalise(x, before, into=into)
    return block._replace(x=y, prologue=Prologue(mask=before.mask, mask_scale=before.mask_scale))


def fills_less_than(block: ConvBlock, size: Sequence[int], multiprocessors: int) -> bool:
    """Whether one ordinary tile for each multiprocessor holds all of the result."""
    members, outputs = block.weight.shape[:2]
    places = -(-block.x.shape[0] // members) * size[0] * size[1]
    return members * -(-places // TILE) * -(-outputs // TILE) <= multiprocessors


def refuses_pass(block: ConvBlock) -> str | None:
    """Return why the prologue's kernel cannot take a block, None where it can."""
    images = [image for image in (block.x, block.prologue.skip) if image is not None]
    if not all(image.is_contiguous(memory_format=torch.channels_last) for image in images):
        return "an image whose channels are not last in memory"
    if block.x.dtype not in KERNEL_DTYPES or any(image.dtype != block.x.dtype for image in images):
        return "a dtype that the kernel has not, or several"
    if block.x.numel() == 0:
        return "nothing to compute"
    return missing_triton(block.x.device)


def pointers_apart(*arguments: Any) -> Tensor:
    """The prologue in a pass of its own, then our kernel with pointer loads and the epilogue."""
    from fastens.kernels.conv2d import conv2d

    c = Call(*arguments)
    return conv2d(prepared(c.block), into=c.written())[0]


def refuses_pointers_apart(*arguments: Any) -> str | None:
    """Why that cannot be taken, or is another way's, or none."""
    c = Call(*arguments)
    if c.block.begins_plain:
        return "nothing before the convolution"
    if c.block.weight.dtype != c.block.x.dtype:
        return "several dtypes"
    return _refuses_into(c) or refuses_pass(c.block)


def _refuses_into(c: Call) -> str | None:
    """Why a kernel does not write the result there, or none."""
    if c.into is not None and not c.into.is_contiguous(memory_format=torch.channels_last):
        return "a result whose channels are not last in memory"
    return "several dtypes" if c.into is not None and c.into.dtype != c.block.x.dtype else None


def tma(tiling: str) -> Callable[..., Tensor]:
    """The prologue, if any, in a pass of its own, then the kernel with TMA descriptors and the epilogue."""

    def way(*arguments: Any) -> Tensor:
        from fastens.kernels._conv2d_tma import conv2d_tma

        c = Call(*arguments)
        return conv2d_tma(prepared(c.block), tiling, c.written())[0]

    return way


def refuses_block(tiling: str) -> Callable[..., str | None]:
    """Why that cannot be taken in this tiling, or none."""

    def why(*arguments: Any) -> str | None:
        c = Call(*arguments)
        block = c.block
        return _refuses_into(c) or refuses_pass(block) or refuses_tma(
            tiling, block.x, block.weight, block.stride, c.size, block.begins_plain
        )  # fmt: skip

    return why


HALO = "halo 256x128"
HALO_WIDTHS = (16, 32, 64)  # of images of which a tile of 256 places is whole lines


def halo(*arguments: Any) -> Tensor:
    """What is before the convolution, if anything, in a pass; then the kernel that loads lines once for three taps."""
    from fastens.kernels._conv2d_halo import conv2d_halo

    c = Call(*arguments)
    return conv2d_halo(prepared(c.block), c.written())[0]


def refuses_halo(*arguments: Any) -> str | None:
    """Why that cannot be taken, or none."""
    c = Call(*arguments)
    block, (height, width), outputs = c.block, c.block.x.shape[2:], c.block.weight.shape[1]
    why = refuses_block("tma 128x128")(*arguments)
    if why is not None:
        return why
    if interpreting() or importlib.util.find_spec("triton.experimental.gluon") is None:
        return "a Triton without Gluon, or its interpreter, which does not run it"
    if device_of(block.x).generation not in (None, 9):
        return "a device without the products of compute capability 9"
    if block.offsets is not None or block.prologue.mask is not None or block.shared:
        return "drawn or shared rows, or a mask"
    if block.x.dtype != torch.bfloat16:
        return "a dtype other than bfloat16"
    same = tuple(c.size) == (height, width) and tuple(block.padding) == tuple(block.stride) == (1, 1)
    if tuple(block.weight.shape[3:]) != (3, 3) or not same:
        return "a convolution other than 3x3 that keeps the image's size"
    if width not in HALO_WIDTHS or height % (2 * TILE // width) or outputs % TILE:
        return "an image that is no whole tiles of lines, or outputs that are no whole tiles"
    if block.epilogue.output_activation not in ("none", "silu"):
        return "an activation behind it other than SiLU"
    return None


def refuses_tma(
    tiling: str, x: Tensor, weight: Tensor, stride: Sequence[int], size: Sequence[int], loads_x: bool = True
) -> str | None:
    """Why the kernel of descriptors does not convolve this in this tiling, or none.

    Args:
        tiling: of :data:`TILINGS`.
        x: [R, C, H, W]; with ``loads_x`` false only its size and dtype count, and channels are those of weight.
        weight: [K, O, C, h, w].
        stride: down and to the right.
        size: of the result's space.
        loads_x: x itself is convolved.
    """
    why = missing_triton(x.device)
    if why is not None:
        return why
    if importlib.util.find_spec("triton.tools.tensor_descriptor") is None:
        return "a Triton without tensor descriptors"
    if device_of(x).generation not in (None, 9, 10):
        return "a device without tensor memory accelerator and 227 KiB of shared memory (compute capability 9 or 10)"
    channels, itemsize = weight.shape[2], x.element_size()
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32) or weight.dtype != x.dtype:
        return "a dtype without products of a warp group, or several"
    if x.dtype == torch.float32 and convolution_precision() != "tf32":
        return "float32 in full precision"
    if not weight.movedim(2, -1).is_contiguous() or not (
        x.is_contiguous(memory_format=torch.channels_last) or not loads_x
    ):
        return "an image or weights whose channels are not last in memory"
    if channels * itemsize % LINE or weight.data_ptr() % LINE or (loads_x and x.data_ptr() % LINE):
        return f"addresses that are no multiples of {LINE} bytes"
    if x.numel() == 0 or weight.numel() == 0:
        return "nothing to compute"
    if tuple(stride) not in ((1, 1), (2, 2)):
        return "a stride other than 1 and 2"
    if stride[0] == 2 and (x.shape[2] % 2 or x.shape[3] % 2):
        return "a stride of 2 over an odd height or width"
    if stride[0] == 2 and channels * itemsize % BOX:
        return f"a stride of 2 over channels of other than multiples of {BOX} bytes"
    if tiling == "tma 128x256":
        if weight.shape[1] <= 128:
            return "no more outputs than a narrower tile has"
        if itemsize == 4 or size[0] * size[1] < 128:  # of several rows, a tile's moments and row bias take more
            return "a tile of more sums than there are registers"
    return None
