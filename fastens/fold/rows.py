"""Which member each row of a folded batch belongs to."""

import torch
from torch import Tensor

from fastens.reference._rows import expand_rows


class NotFoldable(Exception):
    """The fold has no way to run this for all members at once; the module it happened in is looped instead."""


class Rows:
    """The rows of the pass in progress, shared by every folded module of one ensemble.

    Attributes:
        num_members: K.
        total: R, the rows in this pass.
        offsets: int64 [K+1], the first row of each member's group and R; none for K groups of R / K rows.
        row_members: int64 [R], the member of each row where a plan is recorded for any offsets; else none.
        reference: whether torch's operations are to be taken instead of kernels for the CPU.
        probing: whether this pass is the first of its kind, in which modules that fail are looped.
    """

    def __init__(self, num_members: int, reference: bool = False) -> None:
        self.num_members = num_members
        self.reference = reference
        self.total = num_members
        self.offsets: Tensor | None = None
        self.row_members: Tensor | None = None
        self.probing = False

    def set(self, total: int, offsets: Tensor | None = None, row_members: Tensor | None = None) -> None:
        """Start a pass over ``total`` rows."""
        self.total = total
        self.offsets = offsets
        self.row_members = row_members

    def carries_batch(self, x: Tensor) -> bool:
        """Whether dimension 0 of ``x`` can hold the rows: R of them, or R times as many tokens."""
        return x.ndim > 0 and (x.shape[0] == 0 if self.total == 0 else x.shape[0] % self.total == 0)

    def scaled_offsets(self, num_rows: int) -> Tensor | None:
        """The group offsets of a tensor with ``num_rows`` rows, a multiple of R when tokens were flattened into it."""
        if self.offsets is None or num_rows == self.total:
            return self.offsets
        return self.offsets * (num_rows // self.total)

    def expand(self, stack: Tensor, num_rows: int) -> Tensor:
        """Give every row its member's entry: ``stack`` [K, ...] -> [num_rows, ...]."""
        if self.row_members is not None:  # by operations whose shapes do not depend on the offsets
            times = num_rows // self.total
            return stack.index_select(0, self.row_members if times == 1 else self.row_members.repeat_interleave(times))
        return expand_rows(stack, num_rows, self.scaled_offsets(num_rows))

    def members(self, num_rows: int, device: torch.device) -> Tensor:
        """The member of each row, int64 [num_rows]."""
        return self.expand(torch.arange(self.num_members, device=device), num_rows)
