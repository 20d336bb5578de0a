"""One call for several branches: their rows side by side, and the evidence that no member mixes them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fastens.device import device_of
from fastens.engine.arguments import Arguments, PerMember
from fastens.ensemble import Ensemble
from fastens.internal import is_fresh
from fastens.modes import evaluating, moved
from fastens.network.state import random_kept

Call = tuple[tuple[Any, ...], dict[str, Any]]
_FAR = {torch.float64: 1e-7, torch.float32: 1e-3}  # rows that are mixed are further off, rounding is nearer


class Apart(Exception):
    """Branches whose arguments cannot stand side by side; says why."""


class Names:
    """By which names the members' arguments go.

    Args:
        forward: of the members.
    """

    def __init__(self, forward: Any) -> None:
        parameters = inspect.signature(forward).parameters.values()
        self._known = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        self._positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        self._any = any(p.kind is p.VAR_KEYWORD for p in parameters)

    def check(self, names: Iterable[str]) -> None:
        """Raise ValueError where the members take no such argument."""
        for name in names:
            if name not in self._known and not self._any:
                raise ValueError(
                    f"guidance by {name!r}: the members take no such argument (they take {', '.join(self._known)}); "
                    "guidance needs conditional members, and Autoguided does without"
                )

    def replaced(self, call: Call, changed: Mapping[str, Any], batch: int | None = None) -> Call:
        """A call with some of its arguments replaced, or added.

        Args:
            call: positional and keyword arguments.
            changed: new values by name.
            batch: rows; where given, arguments must be there, and numbers and [1, ...] become as many rows.

        Raises:
            ValueError: the call has no such argument.
        """
        args, kwargs = list(call[0]), dict(call[1])
        at = dict(zip(self._positional, range(len(args)), strict=False))
        for name, value in changed.items():
            if batch is not None:
                if name not in at and name not in kwargs:
                    raise ValueError(
                        f"guidance by {name!r}: the call has no such argument, and so no condition; pass it to the "
                        f"sampler, or Guided(conditional={{{name!r}: ...}})"
                    )
                value = _shaped(value, args[at[name]] if name in at else kwargs[name], batch)
            if name in at:
                args[at[name]] = value
            else:
                kwargs[name] = value
        return tuple(args), kwargs


def _shaped(value: Any, like: Any, batch: int) -> Any:
    """A condition with the rows of the one that it takes the place of."""
    if isinstance(value, Mapping) and isinstance(like, Mapping):
        return {**like, **{name: _shaped(each, like.get(name), batch) for name, each in value.items()}}
    if isinstance(like, Tensor) and like.ndim and isinstance(value, Tensor | int | float):
        return _rows(value, like, batch)
    return value


def side_by_side(calls: Sequence[Call], batch: int) -> Call:
    """One call whose rows are those of several, in blocks.

    Tensors with ``batch`` rows are joined, and what differs between the calls is given as many rows first.

    Raises:
        Apart: arguments that have no rows differ, or one is missing.
    """
    flat = [pytree.tree_flatten(call, is_leaf=lambda x: x is None) for call in calls]
    leaves, specs = [leaves for leaves, _ in flat], [spec for _, spec in flat]
    if any(spec != specs[0] for spec in specs):
        raise Apart("the branches have arguments of other structure")
    joined = [_joined(column, batch) for column in zip(*leaves, strict=True)]
    return pytree.tree_unflatten(joined, specs[0])


def _joined(column: tuple[Any, ...], batch: int) -> Any:
    first = column[0]
    alike = all(each is first for each in column)
    if alike and isinstance(first, PerMember):
        rows = first.stack.ndim > 1 and first.stack.shape[1] == batch
        return PerMember.of(torch.cat([first.stack] * len(column), 1)) if rows else first
    if alike and not (isinstance(first, Tensor) and first.ndim and first.shape[0] == batch):
        return first
    if all(isinstance(each, Tensor | int | float) for each in column):
        tensors = [each for each in column if isinstance(each, Tensor)]
        if not tensors and all(type(each) is type(first) and each == first for each in column):
            return first
        like = next((each for each in tensors if each.ndim), tensors[0] if tensors else torch.tensor(first))
        return torch.cat([_rows(each, like, batch) for each in column])
    if all(type(each) is type(first) and not isinstance(each, Tensor) and each == first for each in column):
        return first
    kinds = sorted({type(each).__name__ for each in column})
    raise Apart(f"an argument is {' in one branch, and '.join(kinds)} in another, and neither has rows")


def _rows(value: Any, like: Tensor, batch: int) -> Tensor:
    """A value as ``batch`` rows, [B, ...]."""
    tensor = value if isinstance(value, Tensor) else torch.tensor(value, dtype=like.dtype, device=like.device)
    rows = like.shape[1:] if like.ndim and like.shape[0] in (1, batch) else like.shape
    if tensor.shape[1:] == rows and tensor.ndim == len(rows) + 1 and tensor.shape[0] in (1, batch):
        return tensor.expand(batch, *rows)
    if tensor.ndim == 0 or tensor.shape == rows:
        return tensor.expand(batch, *rows)
    raise ValueError(
        f"guidance: an argument is {list(tensor.shape)} in one branch and {list(like.shape)} in another, expected "
        f"{[batch, *rows]}, or [1, ...] for all rows alike"
    )


@torch.no_grad()
def check_rows(ensemble: Ensemble, joined: Call, calls: Sequence[Call], batch: int) -> None:
    """Hold a member's rows side by side against its rows apart.

    A copy of the first member is asked, in float64 where it can be, so that no state of the ensemble's is touched. One
    that draws numbers shows nothing, and is let through.

    Raises:
        Apart: the member cannot be copied.
        ValueError: rows differ by what stands beside them; or the branches are equal, whatever their condition.
    """
    if is_fresh(ensemble):
        return  # masks of each sample, by its row
    member = ensemble.members[0]
    if any(member is each for each in ensemble.modules()):
        raise Apart("a member that cannot be copied cannot be asked whether it mixes rows")
    evaluating(member)
    with random_kept(), torch.autocast(device_of(ensemble.device).autocast, enabled=False):
        try:
            member, wide = moved(member, torch.float64), torch.float64
            together = [_first(member, joined, wide) for _ in range(2)]
        except Exception:  # it holds its dtype by itself
            member, wide = evaluating(ensemble.members[0]), None
            together = [_first(member, joined, wide) for _ in range(2)]
        if not torch.equal(together[0], together[1]):
            return
        apart = [_first(member, call, wide) for call in calls]
    scale = float(torch.cat(apart).abs().max().clamp_min(1e-30))
    error = float((torch.cat(apart) - together[0]).abs().max()) / scale
    if not error <= _FAR.get(together[0].dtype, 0.1):
        raise ValueError(
            f"guidance: evaluated beside the other branch's rows, a member's rows are {error:.1e} off from what they "
            f"are alone: it mixes the rows of a batch, or a tensor of {batch} rows among its arguments has none of the "
            "batch; compose(..., together=False) evaluates the branches one after the other"
        )
    one_call = all(_same(calls[0], call) for call in calls[1:])  # a condition that is none
    if all(torch.equal(apart[0], other) for other in apart[1:]) and scale > 1e-30 and not one_call:
        raise ValueError(
            "guidance: the members' output is the same under both conditions: they are unconditional, or leave the "
            "argument unused; guide by Autoguided, or take conditional members"
        )


def _same(one: Call, other: Call) -> bool:
    """Whether two calls have equal arguments."""
    pairs = zip(pytree.tree_leaves(one), pytree.tree_leaves(other), strict=True)
    return all(torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b for a, b in pairs)


def _first(member: Any, call: Call, wide: torch.dtype | None) -> Tensor:
    """The first tensor of scores of a member alone, [B, ...]."""

    def moved(x: Any) -> Any:
        return x.to(wide) if wide is not None and isinstance(x, Tensor) and x.is_floating_point() else x

    args, kwargs = Arguments(*pytree.tree_map(moved, call)).of_member(0)
    leaves = pytree.tree_leaves(member(*args, **kwargs))
    return next(x for x in leaves if isinstance(x, Tensor) and x.is_floating_point())
