"""A convolution with what a residual block does before and behind it, as one record.

The op flattens it once, at its schema (:func:`flat_schema`); everything else, from the passes of a plan to the kernels'
launchers and the reference, takes the record.
"""

from __future__ import annotations

import typing
from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, Self

import torch
from torch import Tensor
from typing_extensions import TypeVar

V = TypeVar("V", default=Tensor)  # what stands for a tensor that is not a constant: in plans, a view of memory


class Prologue(NamedTuple, Generic[V]):
    """What is done to the input of a convolution as it is read: ``mask * act(norm(cat([x, skip], 1)))``.

    The norm takes the input by given moments of its groups,
    ``((x - mean) / sqrt(var + eps) * norm_weight_k + norm_bias_k) * (1 + scale) + shift``. C counts the channels of x
    and those of skip; their concatenation is never written.

    Attributes:
        moments: [R, G, T, 2] of x, from :func:`fastens.ops.group_moments.group_moments` or from the epilogue of what
            wrote x; none for no norm. Its groups may be parts of the norm's, which are joined (Chan et al. 1979).
        norm_weight: [K, C], or none.
        norm_bias: [K, C], or none.
        eps: added to the variance.
        scale: [R, C], or none.
        shift: [R, C], or none.
        activation: ``"none"``, ``"silu"``, ``"gelu"`` or ``"gelu_tanh"``.
        skip: [R, C2, H, W], images whose channels follow those of x; none for x alone.
        skip_moments: [R, G2, T, 2] of skip, of groups as large as those of ``moments``; with ``moments`` and ``skip``.
        norm_groups: groups of the norm of all C channels, of which one may be of both x and skip; 0 for as many as
            ``moments`` has.
        mask: int32 [R, H, W, ceil(C / 32)], or [K, H, W, ceil(C / 32)] where a member's rows have one mask: dropout of
            what is convolved, which keeps channel c where bit c % 32 of word c // 32 is set; none to keep all.
        mask_scale: factor of what is kept, 1 / (1 - p).
    """

    moments: V | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    eps: float = 1e-5
    scale: V | None = None
    shift: V | None = None
    activation: str = "none"
    skip: V | None = None
    skip_moments: V | None = None
    norm_groups: int = 0
    mask: V | Tensor | None = None
    mask_scale: float = 1.0


class Epilogue(NamedTuple, Generic[V]):
    """What is done to the sums of a convolution before they are written: ``act((y + row_bias + residual) * scale)``.

    Attributes:
        row_bias: [R, O], such as the embedding of time, or none.
        residual: [R, O, H', W'], or none.
        output_scale: factor of the sum.
        output_activation: as in the prologue, of the result.
        num_groups: groups of the O channels whose moments are returned beside the result; 0 for none.
    """

    row_bias: V | None = None
    residual: V | None = None
    output_scale: float = 1.0
    output_activation: str = "none"
    num_groups: int = 0


class ConvBlock(NamedTuple, Generic[V]):
    """A member-batched two-dimensional convolution with its prologue and epilogue.

    With the moments of the result beside it, the next convolution normalises as it reads: a residual block is two of
    these and nothing between.

    Attributes:
        x: [R, C - C2, H, W], rows grouped by member; [B, C, H, W] where ``shared``.
        weight: [K, O, C, h, w].
        bias: [K, O], or none.
        stride: down and to the right.
        padding: zeros above and below, left and right; of what the prologue gives.
        offsets: int64 [K+1], the first row of each member's group and R; none for K equal groups.
        shared: every member convolves the same rows; R is K B.
        prologue: before it.
        epilogue: behind it.
    """

    x: V
    weight: Tensor
    bias: Tensor | None = None
    stride: Sequence[int] = (1, 1)
    padding: Sequence[int] = (0, 0)
    offsets: V | None = None
    shared: bool = False
    prologue: Prologue[V] = Prologue()
    epilogue: Epilogue[V] = Epilogue()

    @classmethod
    def of(cls, x: V, weight: Tensor, *own: Any, **named: Any) -> ConvBlock[V]:
        """A block of its own fields in their order, and of any field by name, the prologue's and epilogue's too."""
        return cls(x, weight, *own).replace(**named)

    def replace(self, **named: Any) -> Self:
        """The block with other values of fields, the prologue's and epilogue's too."""
        before = {name: named.pop(name) for name in Prologue._fields if name in named}
        behind = {name: named.pop(name) for name in Epilogue._fields if name in named}
        return self._replace(
            prologue=self.prologue._replace(**before), epilogue=self.epilogue._replace(**behind), **named
        )

    def flat(self) -> tuple[Any, ...]:
        """The arguments of the op, in the order of :func:`flat_schema`."""
        return (*self[:-2], *self.prologue, *self.epilogue)

    @classmethod
    def from_flat(cls, values: Sequence[Any]) -> ConvBlock[Any]:
        """The block of the op's arguments; what follows them is left."""
        before = len(cls._fields) - 2
        behind = before + len(Prologue._fields)
        return cls(*values[:before], Prologue(*values[before:behind]), Epilogue(*values[behind : len(FLAT)]))  # pyright: ignore[reportCallIssue]  # as many as fields

    @property
    def begins_plain(self) -> bool:
        """Whether x itself is convolved: no norm, activation or second image before it, and no mask."""
        before = self.prologue
        return before.moments is before.skip is before.mask is None and before.activation == "none"

    @property
    def ends_plain(self) -> bool:
        """Whether nothing is behind it."""
        return self.epilogue == Epilogue()

    def channels_last(self: ConvBlock) -> ConvBlock:
        """The block with its images x, skip and residual so in memory that channels are innermost."""
        x, skip, residual = (
            None if image is None else image.contiguous(memory_format=torch.channels_last)
            for image in (self.x, self.prologue.skip, self.epilogue.residual)
        )
        return self.replace(x=x, skip=skip, residual=residual)

    def result(self: ConvBlock, size: Sequence[int] | None = None, rows: int | None = None) -> Tensor:
        """Memory for the result, channels last; of another space where zeros below are not as above, or fewer rows."""
        if size is None:
            spaces = zip(self.x.shape[2:], self.weight.shape[3:], self.stride, self.padding, strict=True)
            size = [(n + 2 * p - taps) // s + 1 for n, taps, s, p in spaces]
        if rows is None:
            rows = self.x.shape[0] * (self.weight.shape[0] if self.shared else 1)
        shape = (rows, self.weight.shape[1], *size)
        return torch.empty(shape, dtype=self.x.dtype, device=self.x.device, memory_format=torch.channels_last)

    def tensors(self) -> list[Tensor]:
        """All floating-point tensors."""
        return [t for t in self.flat() if isinstance(t, Tensor) and t.is_floating_point()]


FLAT = (*ConvBlock._fields[:-2], *Prologue._fields, *Epilogue._fields)
_KINDS = {bool: "bool", int: "SymInt", float: "float", str: "str", Sequence[int]: "SymInt[]"}


def flat_schema() -> str:
    """The arguments of the op as its schema declares them, from the annotations of the records."""
    records = (ConvBlock, Prologue, Epilogue)
    hints = {name: hint for record in records for name, hint in typing.get_type_hints(record).items()}

    def kind(hint: Any) -> str:
        return _KINDS.get(hint) or ("Tensor?" if type(None) in typing.get_args(hint) else "Tensor")

    return ", ".join(f"{kind(hints[name])} {name}" for name in FLAT)
