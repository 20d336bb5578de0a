"""What the launches of a plan call: each writes its first argument, which was laid out beforehand, and returns nothing.

``backend`` is ``"auto"``, ``"triton"`` or ``"reference"``, as for the ops; shapes are those of the ops.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastens.device import on_gpu
from fastens.kernels._into import merged
from fastens.ops import conv2d_sum as sum_op
from fastens.ops import dropout as dropout_op
from fastens.ops import group_moments as moments_op
from fastens.ops import group_norm as norm_op
from fastens.ops import layer_norm as layer_norm_op
from fastens.ops import linear as linear_op
from fastens.ops import linear_group as group_op
from fastens.ops._block_ways import CHOICE
from fastens.ops._dispatch import missing_triton
from fastens.ops._sum_ways import CHOICE as SUM_CHOICE
from fastens.ops._tma_ways import Call
from fastens.ops.pointwise import Instruction
from fastens.plan.graph import ACTIVATIONS
from fastens.program.block import ConvBlock, Prologue
from fastens.program.steps import Opcode
from fastens.reference._activation import activate
from fastens.reference.conv2d import keeps, together
from fastens.reference.pointwise import unrounded

LIBRARY_INPUTS = 512  # beyond these a product of many vectors is bound by arithmetic, not by memory. Not measured.


def conv2d(out: Tensor, block: ConvBlock, moments: Tensor | None, backend: str) -> None:
    """A convolution with what is before and behind it, and moments of its result.

    ``padding`` is above and to the left; how many zeros are below and to the right follows from the size of ``out``.
    Rows that are dealt out by ``offsets`` or dropped by ``mask`` run in our kernel, whatever measures best; rows that
    all members share are read once by it, and repeated for the library.
    """
    block = block._replace(x=block.x.to(block.weight.dtype))
    if block.shared and uses_triton(block.x, backend):
        from fastens.kernels.conv2d import conv2d as launch

        launch(block, into=(out, moments))
        return
    if block.shared:
        block = block._replace(x=block.x.repeat(block.weight.shape[0], 1, 1, 1), shared=False)
    call, way = Call(block, tuple(out.shape[2:]), out, moments), "library"
    if _ours(call, backend):
        # ways are measured, and compared, on results in memory of their own; on the CPU nothing is measured
        way = CHOICE.choose(call[:2], block.x.device, "auto" if _measured(block) else "triton")
    CHOICE.ways[way].run(*call)


def conv2d_way(out: Tensor, block: ConvBlock, moments: Tensor | None, backend: str) -> str | None:
    """The way that such a convolution takes, none where that is not measured yet; nothing runs."""
    call = Call(block._replace(x=block.x.to(block.weight.dtype)), tuple(out.shape[2:]), out, moments)
    if block.shared:
        return "triton" if uses_triton(block.x, backend) else "library"
    if not _ours(call, backend):
        return "library"
    return CHOICE.known(call[:2], block.x.device) if _measured(block) else "triton"


def _measured(block: ConvBlock) -> bool:
    return on_gpu(block.x) and block.offsets is block.prologue.mask is None


def _ours(call: Call, backend: str) -> bool:
    """Whether our kernel may run it."""
    return uses_triton(call.block.x, backend) and CHOICE.ways["triton"].refuses(*call) is None


def conv2d_sum(weights: list[float], block: ConvBlock, backend: str) -> Tensor:
    """The last convolution, summed over the members with their weights: [B, O, H', W'], contiguous."""
    block = block.replace(x=block.x.to(block.weight.dtype), num_groups=0)
    if on_gpu(block.x) and uses_triton(block.x, backend):
        return SUM_CHOICE.ways[SUM_CHOICE.choose((block, weights), block.x.device)].run(block, weights).contiguous()
    return sum_op.conv2d_sum(block, weights, _named(block.x, backend)).contiguous()


def moments(out: Tensor, x: Tensor, num_groups: int, backend: str) -> None:
    """Moments of groups [R, G, T, 2] of an image that no convolution before it could take."""
    if uses_triton(x, backend):
        from fastens.kernels.group_moments import group_moments as launch

        launch(x, num_groups, into=out)
    else:
        out.copy_(moments_op.group_moments(x, num_groups, backend="reference"))


def group_norm(out: Tensor, x: Tensor, prologue: Prologue, offsets: Tensor | None, backend: str) -> None:
    """The prologue of a convolution in a pass of its own.

    It is group norm by known moments, and activation; without moments the activation alone.
    """
    activation = prologue.activation
    if prologue.moments is None:
        pointwise(out, [x], [(ACTIVATIONS[activation], 0, 0, 0.0)], backend)
        return
    if uses_triton(x, backend) and merged(out.shape[2:], out.stride()[2:]) is not None:
        from fastens.kernels.group_norm import normalise

        normalise(x, prologue, offsets, out)
        return
    image, whole = together(x, prologue)
    assert whole is not None
    fused = activation if activation in ("none", "silu") else "none"
    y = norm_op.group_norm(
        image, whole.shape[1], prologue.norm_weight, prologue.norm_bias, prologue.eps, offsets, prologue.scale,
        prologue.shift, fused, backend=_named(x, backend),
    )  # fmt: skip
    out.copy_(y if fused == activation else activate(y, activation))


def linear(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    backend: str,
    offsets: Tensor | None = None,
) -> None:
    """A linear layer of the channels of images [R, C, H, W], and the activation behind it."""
    tokens, places, stack = x.movedim(1, -1), out.movedim(1, -1), weight.flatten(2)
    members, outputs, inputs = stack.shape
    if not uses_triton(x, backend):
        tokens = tokens.to(weight.dtype)
        places.copy_(linear_op.linear(tokens, stack, bias, offsets, activation, backend=_named(x, backend)))
    elif offsets is None and tokens.shape[:-1].numel() > linear_op.FUSED_ROWS * members and inputs > LIBRARY_INPUTS:
        # products that arithmetic bounds are the library's; what is behind them is one pass
        y = torch.bmm(tokens.to(weight.dtype).reshape(members, -1, inputs), stack.transpose(1, 2))
        y = y.view(members, -1, *tokens.shape[1:-1], outputs)
        code = [(ACTIVATIONS[activation], 0, 0, 0.0)]
        if bias is not None:
            code = [(Opcode.ADD, 0, 1, 0.0), (ACTIVATIONS[activation], 2, 0, 0.0)]
        operands = [y] if bias is None else [y, bias.view(members, *[1] * (y.ndim - 2), outputs)]
        pointwise(places.unflatten(0, (members, -1)), operands, code, backend)
    else:
        from fastens.kernels.linear import linear as launch

        direct = merged(places.shape[:-1], places.stride()[:-1]) is not None and 1 in (places.stride(-1), outputs)
        y = launch(tokens, stack, bias, offsets, activation, into=places if direct else None)
        if not direct:
            places.copy_(y)


def linear_group(
    outs: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activation: str,
    backend: str,
) -> None:
    """Linear layers of the channels of the same images [R, C, H, W], and the activation behind them."""
    tokens, into = x.movedim(1, -1), [out.movedim(1, -1) for out in outs]
    if not uses_triton(x, backend):
        tokens = tokens.to(weights[0].dtype)
    stacks = [weight.flatten(2) for weight in weights]
    group_op.linear_group(tokens, stacks, biases, activation, backend=_named(x, backend), into=into)


def layer_norm(
    out: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    backend: str,
    offsets: Tensor | None = None,
) -> None:
    """Layer norm of tokens [R, T, C], each contiguous."""
    if uses_triton(x, backend):
        from fastens.kernels.layer_norm import layer_norm as launch

        launch(x, list(x.shape[-1:]), weight, bias, eps, offsets, into=out)
    else:
        out.copy_(layer_norm_op.layer_norm(x, x.shape[-1:], weight, bias, eps, offsets, backend=_named(x, backend)))


def gather(out: Tensor, table: Tensor, members: Tensor) -> None:
    """The line [n] of each row's member in a table [K, n]."""
    torch.index_select(table, 0, members, out=out)


def draw(
    bits: Sequence[Tensor], drawn: Tensor, keys: Sequence[int], members: Tensor | None, samples: Tensor,
    rows_per_member: int, threshold: int, channels: Sequence[int], steps: Sequence[tuple[int, int]], backend: str,
) -> None:  # fmt: skip
    """The bits of fresh dropout masks, each int32 [R, places, words]; see :func:`fastens.kernels._masks.draw_bits`."""
    if uses_triton(drawn, backend):
        from fastens.kernels._masks import draw_bits

        draw_bits(bits, drawn, keys, members, samples, rows_per_member, threshold, channels, steps)
        return
    numbers = drawn.tolist()
    for own, key, count, step in zip(bits, keys, channels, steps, strict=True):
        rows, places, words = own.shape
        if members is None:
            members = torch.arange(rows, device=own.device) // rows_per_member
        ones = torch.ones(rows, places * count, device=own.device)
        kept = dropout_op.dropout(ones, members, samples, threshold / 2**32, numbers[1 + key], numbers[0]) > 0
        kept = kept.as_strided((rows, places, count), (places * count, *step))
        parts = F.pad(kept.long(), (0, -count % 32)).unflatten(-1, (words, 32))
        own.copy_((parts << torch.arange(32, device=own.device)).sum(-1))


def masked(out: Tensor, x: Tensor, bits: Tensor, scale: float, backend: str) -> None:
    """An image under a dropout mask of each row, or of each member, int32 [R or K, H, W, words]."""
    if uses_triton(out, backend):
        from fastens.kernels._masks import apply_bits

        apply_bits(x, bits, scale, out)
        return
    kept = keeps(bits.repeat_interleave(x.shape[0] // bits.shape[0], 0), x, 1, None)
    out.copy_(x * (kept * scale))


def attention(out: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str = "auto") -> None:
    """Attention without mask, [R, heads, tokens, width]; of float32 and larger heads by torch, which has no ``out``."""
    if uses_triton(out, backend):
        from fastens.kernels import _attention as kernel

        if kernel.takes(q, v, out):
            kernel.attention(q, k, v, scale, out)
            return
    q, k, v = (x.to(out.dtype) for x in (q, k, v))
    out.copy_(F.scaled_dot_product_attention(q, k, v, scale=scale))


def join(out: Tensor, images: Sequence[Tensor], up: int, backend: str = "auto") -> None:
    """Images [R, C, H, W] one after the other along the channels, each pixel ``up`` times in both directions."""
    if uses_triton(out, backend):
        from fastens.kernels._join import join as launch

        launch(images, up, out)
        return
    start = 0
    for image in images:
        part = out[:, start : start + image.shape[1]].unflatten(3, (-1, up)).unflatten(2, (-1, up))
        part.copy_(image[:, :, :, None, :, None].expand_as(part))
        start += image.shape[1]


def pointwise(out: Tensor, inputs: Sequence[Tensor], code: Sequence[Instruction], backend: str = "auto") -> None:
    """A chain of elementwise instructions; the inputs are the first registers, each instruction writes the next one."""
    opcodes, a, b, numbers = zip(*code, strict=True)
    if uses_triton(out, backend):
        from fastens.kernels.pointwise import pointwise as launch

        launch(inputs, opcodes, a, b, numbers, out)
    else:
        out.copy_(unrounded(inputs, opcodes, a, b, numbers))


def uses_triton(x: Tensor, backend: str) -> bool:
    """Whether a launch on this tensor is one of Triton's kernels."""
    return backend == "triton" or (backend == "auto" and on_gpu(x) and _runs_triton(x.device))


@functools.cache
def _runs_triton(device: torch.device) -> bool:
    return missing_triton(device) is None


def _named(x: Tensor, backend: str) -> str:
    return "auto" if on_gpu(x) and backend == "triton" else backend
