"""The plain loop over members, the rules written anew, and how an answer is held against them.

It shares no code with the package: members are rebuilt from their specification, and every change is applied to each.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

# Relative to the largest magnitude expected: the same operations in another order.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.15}
# The geometric mean takes the logarithm of a shift of 1e-6, which magnifies rounding.
GEOMETRIC = {torch.float64: 1e-6, torch.float32: 2e-2, torch.bfloat16: 0.5}
FLOOR = 1e-3  # an answer smaller than this has lost its digits to cancellation


class Mismatch(AssertionError):
    """An answer that is not the loop's; ``size`` is how far it is off, relative to the largest magnitude."""

    def __init__(self, why: str, size: float = float("inf")) -> None:
        super().__init__(why)
        self.size = size


def is_score(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def stacked(scores: Tensor) -> Tensor:
    return scores


def combined(outputs: list[Any], combine: Callable[[Tensor], Tensor]) -> Any:
    """What K outputs become when every score among their leaves is combined; other leaves are member 0's.

    Where they are stacked, every tensor is.
    """

    def enters(x: Any) -> bool:
        return is_score(x) or (combine is stacked and isinstance(x, Tensor))

    flat = [pytree.tree_flatten(output) for output in outputs]
    columns = zip(*(leaves for leaves, _ in flat), strict=True)
    leaves = [combine(torch.stack(column)) if enters(column[0]) else column[0] for column in columns]
    return pytree.tree_unflatten(leaves, flat[0][1])


def mean(scores: Tensor) -> Tensor:
    return scores.sum(0) / len(scores)


def total(scores: Tensor) -> Tensor:
    return scores.sum(0)


def median(scores: Tensor) -> Tensor:
    ordered = torch.sort(scores, 0)[0]
    k = len(scores)
    return _seen(scores, (ordered[(k - 1) // 2] + ordered[k // 2]) / 2)


def _seen(scores: Tensor, result: Tensor) -> Tensor:
    """A NaN of one member reaches the output, where comparisons would pass it over."""
    return torch.where(scores.isnan().any(0), float("nan"), result)


def geometric(scores: Tensor) -> Tensor:
    if scores.numel() == 0:
        return scores[0]
    wide = scores.double()
    lowest = wide.transpose(0, 1).flatten(1).min(1).values.reshape(1, -1, *[1] * (scores.ndim - 2))
    shift = lowest.abs() + 1e-6
    return (torch.log(wide + shift).mean(0).exp() - shift[0]).to(scores.dtype)


def dominant(scores: Tensor) -> Tensor:
    result = scores[0]
    for other in scores[1:]:
        result = torch.where(other.abs() > result.abs(), other, result)
    return _seen(scores, result)


def max_abs(scores: Tensor) -> Tensor:
    return scores.abs().max(0).values


def weighted(scores: Tensor) -> Tensor:
    """The mean under :func:`weights`; a member of weight zero is not used."""
    parts = [w * s for w, s in zip(weights(len(scores)), scores, strict=True) if w != 0]
    return torch.stack(parts).sum(0)


def weights(count: int) -> list[float]:
    """Weights that differ, one of them negative, and sum to 1."""
    return [1.0] if count == 1 else [*(2.0 / count for _ in range(count - 1)), 2.0 / count - 1.0]


def variance(scores: Tensor) -> Tensor:
    return (scores - scores.mean(0)).square().mean(0)


RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": mean,
    "sum": total,
    "median": median,
    "geometric": geometric,
    "dominant": dominant,
    "max_abs": max_abs,
    "weighted": weighted,
}


_held_to = [1.0]  # the share of the tolerances that differences may have


@contextlib.contextmanager
def finer(share: float) -> Iterator[None]:
    """Hold differences to a share of the tolerances, to see those that pass them."""
    _held_to.append(share)
    try:
        yield
    finally:
        _held_to.pop()


def tolerance(dtype: torch.dtype, rule: str = "mean") -> float:
    return _held_to[-1] * (GEOMETRIC if rule == "geometric" else TOLERANCE)[dtype]


def largest(outputs: list[Any]) -> float:
    """The largest finite magnitude of the members' scores."""
    scores = [leaf.detach().double() for leaf in pytree.tree_leaves(outputs) if is_score(leaf) and leaf.numel()]
    return max((float(torch.where(s.isfinite(), s, 0.0).abs().max()) for s in scores), default=0.0)


def check(actual: Any, expected: Any, relative: float, outputs: list[Any] | None = None) -> None:
    """Raise Mismatch unless structures, shapes and dtypes are equal and values as near as rounding leaves them.

    Args:
        actual: the answer.
        expected: the loop's.
        relative: the largest difference, relative to the largest magnitude.
        outputs: of the members, where the rule picks one of them: a pick among near ties is as good.
    """
    got, wanted = pytree.tree_flatten(actual), pytree.tree_flatten(expected)
    if got[1] != wanted[1]:
        raise Mismatch(f"structure {got[1]}, expected {wanted[1]}")
    columns = list(zip(*map(pytree.tree_leaves, outputs), strict=True)) if outputs else [None] * len(got[0])
    for i, (a, e, members) in enumerate(zip(got[0], wanted[0], columns, strict=True)):
        _check_leaf(f"leaf {i}", a, e, relative, members)


def _check_leaf(name: str, a: Any, e: Any, relative: float, members: Any) -> None:
    if not isinstance(e, Tensor):
        if a is not e and a != e:
            raise Mismatch(f"{name}: {a!r}, expected {e!r}")
        return
    if not isinstance(a, Tensor) or a.shape != e.shape or a.dtype != e.dtype:
        said = f"{a.dtype} {list(a.shape)}" if isinstance(a, Tensor) else repr(a)
        raise Mismatch(f"{name}: {said}, expected {e.dtype} {list(e.shape)}")
    if e.numel() == 0:
        return
    a, e = a.detach().double(), e.detach().double()
    if torch.equal(a.nan_to_num(1e30), e.nan_to_num(1e30)):
        return
    finite = e.isfinite()
    if not torch.equal(a.isfinite(), finite):
        raise Mismatch(
            f"{name}: {int((a.isfinite() != finite).sum())} of {e.numel()} elements are not finite as expected"
        )
    difference = torch.where(finite, a - e, 0.0).abs()
    allowed = relative * max(float(torch.where(finite, e, 0.0).abs().max()), FLOOR)
    if members is not None:
        for member in members:
            value = member.detach().double()
            near = value.abs() >= e.abs() - allowed
            difference = torch.where(near, torch.minimum(difference, (a - value).abs()), difference)
    if float(difference.max()) > allowed:
        worst = float(difference.max()) / allowed * relative
        share = float((difference > allowed).double().mean())
        why = f"{name}: off by {worst:.2g} of the largest magnitude, in {100 * share:.0f} % of the elements"
        raise Mismatch(why, worst)


def check_drawn(actual: Any, candidates: list[list[Any]], dim: int, relative: float) -> list[set[int]]:
    """Raise Mismatch unless every row is some member's; return the members that each row may be of.

    Args:
        actual: the answer of a rule that draws members.
        candidates: of each member, outputs any of which a row may be taken from: of the batch, or of the row alone.
        dim: where rows are.
        relative: as for :func:`check`.
    """
    found: list[set[int]] = []
    for leaf, *options in zip(
        pytree.tree_leaves(actual), *(map(pytree.tree_leaves, (zip_outputs(c) for c in candidates))), strict=True
    ):
        if not is_score(leaf):
            continue
        rows = leaf.shape[dim]
        found = found or [set(range(len(candidates))) for _ in range(rows)]
        for row in range(rows):
            off = [_off(leaf, option, dim, row) for option in options]
            found[row] &= {k for k, distance in enumerate(off) if distance <= relative}
            if not found[row]:
                nearest = min(off)
                raise Mismatch(f"row {row} is no member's", nearest if nearest > relative else float("inf"))
    return found


class Options:
    """One leaf of several outputs of a member."""

    def __init__(self, values: tuple[Any, ...]) -> None:
        self.values = values


def zip_outputs(outputs: list[Any]) -> Any:
    leaves = [pytree.tree_leaves(output) for output in outputs]
    return [Options(column) for column in zip(*leaves, strict=True)]


def _off(leaf: Tensor, options: Options, dim: int, row: int) -> float:
    """How far a row is from the nearest of a member's outputs, relative to that one's largest magnitude."""
    got, nearest = leaf.detach().select(dim, row).double(), float("inf")
    for value in options.values:
        if value.shape != leaf.shape or value.dtype != leaf.dtype:
            continue
        value, expected = value.detach(), value.detach().select(dim, row).double()
        scale = max(float(torch.where(value.isfinite(), value, 0.0).abs().max()), FLOOR)
        same = (got == expected) | (got.isnan() & expected.isnan())  # weights that a training lost make rows of NaN
        difference = float(torch.where(same, 0.0, (got - expected).abs()).max()) / scale
        nearest = min(nearest, difference if difference == difference else float("inf"))
    return nearest
