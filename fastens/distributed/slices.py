"""Rules over members on several ranks: each rank reduces some rows, or elements, of all members."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastens import reproducible, rules
from fastens.distributed.exchange import Exchange, split

Combine = Callable[[Any], Tensor]
# Rules whose result of a row depends on that row alone. Of a user's nobody knows: those see all members and rows.
_OF_ROWS = (rules.Mean, rules.NoiseDependentMean, rules.Sum, rules.Product, rules.Median, rules.Dominant, rules.MaxAbs)
_OF_ELEMENTS = (rules.Mean, rules.Sum, rules.Median, rules.Dominant, rules.MaxAbs, rules.Geometric)


def of_rows(rule: rules.Rule) -> bool:
    """Whether rows may be combined apart."""
    return type(rule) in _OF_ROWS or (type(rule) is rules.Geometric and rule.shift == "sample")


def of_elements(rule: rules.Rule) -> bool:
    """Whether elements of a row may be, once all ranks know what the smallest is."""
    return type(rule) in _OF_ELEMENTS


def bits_matter() -> bool:
    """Whether ``fastens.deterministic`` is on, so that the order of additions may not depend on the mesh."""
    return reproducible.enabled()


def weights_of(rule: rules.Rule, num_members: int) -> list[float] | None:
    """Return the members' weights under a rule that is a weighted sum, None for other rules."""
    if type(rule) is rules.Mean:
        return list(rule.weights or [1 / num_members] * num_members)
    return [1.0] * num_members if type(rule) is rules.Sum else None


class Slices:
    """The scores of a batch [B, ...], cut into one slice for each rank: by rows, or, of few rows, by elements.

    Args:
        exchange: of the ranks that hold the members.
        counts: how many members each of them has.
        shape: of one member's scores, [B, ...].
        by_elements: cut the rows, too.
    """

    def __init__(self, exchange: Exchange, counts: Sequence[int], shape: torch.Size, by_elements: bool) -> None:
        self.exchange, self.counts, self.shape, self.by_elements = exchange, list(counts), shape, by_elements
        length = shape[1:].numel() if by_elements else shape[0]
        self.sizes = split(length, exchange.size)
        self.start = sum(self.sizes[: exchange.rank])
        self.size = self.sizes[exchange.rank]

    def _shape_of(self, size: int) -> tuple[int, ...]:
        return (self.shape[0], size) if self.by_elements else (size, *self.shape[1:])

    def _cut(self, x: Tensor) -> list[Tensor]:
        """One tensor [n, B, ...] as the slices of each rank."""
        return list((x.flatten(2) if self.by_elements else x).split(self.sizes, 2 if self.by_elements else 1))

    def members(self, scores: Any) -> Tensor:
        """This rank's slice of every member, [K, ...], in their order; scores: [k, B, ...] of those that count."""
        own = scores if isinstance(scores, Tensor) else torch.stack(list(scores))
        shapes = [(count, *self._shape_of(self.size)) for count in self.counts]
        return torch.cat(self.exchange.all_to_all(self._cut(own), shapes))

    def beside_smallest(self, stack: Tensor) -> Tensor:
        """Slices of elements [K, B, n] with one more, the smallest in the row: what a shift by the sample goes by."""
        infinite = stack.new_full((*stack.shape[:2], 1), torch.inf)
        own = torch.cat([stack, infinite], 2).amin((0, 2))
        smallest = torch.stack(self.exchange.gather(own, [own.shape] * self.exchange.size)).amin(0)
        return torch.cat([stack, smallest[None, :, None].expand(len(stack), -1, 1)], 2)

    def total(self, scores: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """This rank's slice of the weighted sum, float32 at least: partial sums, added up in the order of the ranks."""
        wide = torch.promote_types(scores[0].dtype, torch.float32)
        own = torch.zeros(self.shape, dtype=wide, device=scores[0].device)
        for score, weight in zip(scores, weights, strict=False):
            if weight:
                own = own.add(score.to(wide), alpha=weight)
        parts = self.exchange.all_to_all(self._cut(own[None]), [(1, *self._shape_of(self.size))] * self.exchange.size)
        total = parts[0][0]
        for part in parts[1:]:
            total = total + part[0]
        return total

    def whole(self, reduced: Tensor) -> Tensor:
        """All slices, once each rank has reduced its own, [B, ...]."""
        parts = self.exchange.gather(reduced, [self._shape_of(size) for size in self.sizes])
        return torch.cat(parts, 1).reshape(self.shape) if self.by_elements else torch.cat(parts)


def wire_bytes(
    shape: Sequence[int], item: int, num_members: int, ranks: int, partial: bool, extra: int = 0
) -> list[int]:
    """What each rank sends in one call under a rule, in bytes of data: the formula that is held against measurements.

    Args:
        shape: of one member's scores, [B, ...], whose rows the ranks cut.
        item: bytes of an element.
        num_members: K.
        ranks: n, of the axis ``member``.
        partial: partial sums are sent, in float32; else the members' scores.
        extra: further results that are gathered beside the aggregate, as the variance.

    Where elements of few rows are cut, the n ranks' numbers of them are in the place of rows, and ``geometric`` sends
    the smallest of each row besides.
    """
    size, row = -(-num_members // ranks), torch.Size(shape[1:]).numel()
    rows = split(shape[0], ranks)
    sent = []
    for rank in range(ranks):
        held = max(0, min(size, num_members - rank * size))
        out = sum(rows) - rows[rank]  # rows of others
        scatter = out * row * (max(item, 4) if partial else held * item)
        sent.append(scatter + (1 + extra) * rows[rank] * row * item * (ranks - 1))
    return sent
