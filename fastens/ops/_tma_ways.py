"""Ways of a convolution by kernels whose loads are tensor descriptors, and what those do not take."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastens.ops._dispatch import KERNEL_DTYPES, missing_triton
from fastens.reference._activation import activate

LINE = 16  # bytes that addresses and strides in descriptors are multiples of
BOX = 128  # bytes of channels that a box holds
TILE = 128  # places, and output channels, of an ordinary tile
TILINGS = ("tma 64x128", "tma 128x128", "tma 128x256")  # places by output channels


class Block(NamedTuple):
    """The arguments of the ways of ``conv2d``, in their order."""

    into: Tensor | None
    found: Tensor | None
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    size: tuple[int, int]
    moments: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    eps: float = 1e-5
    scale: Tensor | None = None
    shift: Tensor | None = None
    activation: str = "none"
    row_bias: Tensor | None = None
    residual: Tensor | None = None
    output_scale: float = 1.0
    output_activation: str = "none"
    num_groups: int = 0
    skip: Tensor | None = None
    skip_moments: Tensor | None = None
    norm_groups: int = 0

    @property
    def begins_plain(self) -> bool:
        """Whether x itself is convolved: no norm, activation or second image before it."""
        return self.moments is None and self.activation == "none" and self.skip is None

    def prepared(self) -> Tensor:
        """What is convolved, in memory of its own: normalised by the given moments, or joined and activated alone."""
        if self.moments is None:
            whole = self.x if self.skip is None else torch.cat([self.x, self.skip], 1)
            return activate(whole.contiguous(memory_format=torch.channels_last), self.activation)
        from fastens.kernels.group_norm import normalise

        size = (self.x.shape[0], self.weight.shape[2], *self.x.shape[2:])
        return normalise(
            self.x, self.moments, self.norm_weight, self.norm_bias, self.eps, self.scale, self.shift, self.activation,
            skip=self.skip, skip_moments=self.skip_moments, norm_groups=self.norm_groups,
            into=torch.empty(size, dtype=self.x.dtype, device=self.x.device, memory_format=torch.channels_last),
        )  # fmt: skip

    def result(self) -> Tensor:
        """Where the result is written."""
        if self.into is not None:
            return self.into
        shape = (self.x.shape[0], self.weight.shape[1], *self.size)
        return torch.empty(shape, dtype=self.x.dtype, device=self.x.device, memory_format=torch.channels_last)


def fills_less_than(c: Block, multiprocessors: int) -> bool:
    """Whether one ordinary tile for each multiprocessor holds all of the result."""
    members = c.weight.shape[0]
    places = -(-c.x.shape[0] // members) * c.size[0] * c.size[1]
    return members * -(-places // TILE) * -(-c.weight.shape[1] // TILE) <= multiprocessors


def refuses_pass(*arguments: object) -> str | None:
    """Why the kernel of what is before a convolution does not take it, or none."""
    c = Block(*arguments)  # pyright: ignore[reportArgumentType]
    images = [image for image in (c.x, c.skip) if image is not None]
    if not all(image.is_contiguous(memory_format=torch.channels_last) for image in images):
        return "an image whose channels are not last in memory"
    if c.x.dtype not in KERNEL_DTYPES or any(image.dtype != c.x.dtype for image in images):
        return "a dtype that the kernel has not, or several"
    if c.x.numel() == 0:
        return "nothing to compute"
    return missing_triton(c.x.device)


def pointers_apart(*arguments: object) -> Tensor:
    """What is before the convolution in a pass, then our kernel of pointer loads with all that follows."""
    from fastens.kernels.conv2d import conv2d

    c = Block(*arguments)  # pyright: ignore[reportArgumentType]
    y, _ = conv2d(
        c.prepared(), c.weight, c.bias, c.stride, c.padding, row_bias=c.row_bias, residual=c.residual,
        output_scale=c.output_scale, output_activation=c.output_activation, num_groups=c.num_groups,
        into=(c.result(), c.found),
    )  # fmt: skip
    return y


def refuses_pointers_apart(*arguments: object) -> str | None:
    """Why that cannot be taken, or is another way's, or none."""
    c = Block(*arguments)  # pyright: ignore[reportArgumentType]
    if c.begins_plain:
        return "nothing before the convolution"
    if c.weight.dtype != c.x.dtype or (c.into is not None and c.into.dtype != c.x.dtype):
        return "several dtypes"
    if c.into is not None and not c.into.is_contiguous(memory_format=torch.channels_last):
        return "a result whose channels are not last in memory"
    return refuses_pass(*arguments)


def tma(tiling: str) -> Callable[..., Tensor]:
    """What is before the convolution, if anything, in a pass; then the kernel of descriptors with all that follows."""

    def way(*arguments: object) -> Tensor:
        from fastens.kernels._conv2d_tma import conv2d_tma

        c = Block(*arguments)  # pyright: ignore[reportArgumentType]
        y, _ = conv2d_tma(
            c.x if c.begins_plain else c.prepared(), c.weight, c.bias, c.stride, c.padding, c.row_bias, c.residual,
            c.output_scale, c.output_activation, c.num_groups, tiling, (c.result(), c.found),
        )  # fmt: skip
        return y

    return way


def refuses_block(tiling: str) -> Callable[..., str | None]:
    """Why that cannot be taken in this tiling, or none."""

    def why(*arguments: object) -> str | None:
        c = Block(*arguments)  # pyright: ignore[reportArgumentType]
        if c.into is not None and not c.into.is_contiguous(memory_format=torch.channels_last):
            return "a result whose channels are not last in memory"
        if c.into is not None and c.into.dtype != c.x.dtype:
            return "several dtypes"
        before = refuses_pass(*arguments)
        return before or refuses_tma(tiling, c.x, c.weight, c.stride, c.size, c.begins_plain)

    return why


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
    if x.is_cuda and torch.cuda.get_device_capability(x.device)[0] not in (9, 10):
        return "a device without tensor memory accelerator and 227 KiB of shared memory (compute capability 9 or 10)"
    channels, itemsize = weight.shape[2], x.element_size()
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32) or weight.dtype != x.dtype:
        return "a dtype without products of a warp group, or several"
    if x.dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision != "tf32":
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
