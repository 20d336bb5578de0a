"""Several calls of an ensemble in one pass, and their weighted differences: before its rule, or after."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fastens import parameterisation
from fastens.composition.rows import Apart, Call, check_rows, side_by_side
from fastens.draws import assigned_to
from fastens.engine.arguments import Arguments
from fastens.ensemble import Ensemble
from fastens.internal import aggregation_of, combine, outputs_of, prediction_of
from fastens.outputs import is_scores
from fastens.schedules import per_sample

ORDERS = ("after", "before")


class Branches:
    """``main + sum_j factor_j (main - branch_j)`` of calls of an ensemble.

    Args:
        ensemble: whose members are called.
        order: ``"after"`` takes what the rule made of the members, ``"before"`` each member, and then the rule.
        together: whether the branches are rows of one pass; turned off where they cannot be.
    """

    def __init__(self, ensemble: Ensemble, order: str, together: bool) -> None:
        if order not in ORDERS:
            raise ValueError(f"compose: order {order!r} is unknown, expected one of {', '.join(map(repr, ORDERS))}")
        self.ensemble, self.order, self.together = ensemble, order, together
        self._held: set[Any] = set()

    def __call__(self, main: Call, others: Sequence[tuple[Any, Call]], weak: Sequence[tuple[Any, Any]] = ()) -> Any:
        """Evaluate and add up.

        Args:
            main: the call that is guided.
            others: factors, numbers or [B], and the calls that it is guided away from.
            weak: factors, and what other networks returned for it.
        """
        ensemble, calls = self.ensemble, [main, *(call for _, call in others)]
        factors = [factor for factor, _ in (*others, *weak)]
        arguments = Arguments(*main)
        x = parameterisation.noisy_input(ensemble.forward, arguments, *main)

        def added(*parts: Tensor) -> Tensor:
            return self._added(x, factors, parts)

        if self.order == "after" or not factors or self._combines_alike:
            return mapped(added, [*self._outputs(calls, arguments.batch_size), *(output for _, output in weak)])
        joined = self._joined(calls, arguments.batch_size)
        if joined is None:
            parts = [outputs_of(ensemble, *call) for call in calls]
        else:
            parts = self._parts(joined, len(calls), arguments.batch_size)
        beside = [pytree.tree_leaves(output) for _, output in weak]
        guided = []
        for i, column in enumerate(zip(*(part[:-1] for part in parts), strict=True)):
            more = [leaves[i] for leaves in beside]
            scores = is_scores(column[0])
            guided.append([added(*each, *more) for each in zip(*column, strict=True)] if scores else column[0])
        return combine(ensemble, [*guided, parts[0][-1]], aggregation_of(ensemble, *main))

    @property
    def _combines_alike(self) -> bool:
        """Whether guidance before the rule is guidance after it."""
        rule = self.ensemble.rule
        return rule.linear or rule.random or assigned_to(self.ensemble) is not None

    def _outputs(self, calls: list[Call], batch: int) -> list[Any]:
        """What the ensemble returns for each call."""
        ensemble = self.ensemble
        joined = self._joined(calls, batch)
        if joined is None:
            return [ensemble(*args, **kwargs) for args, kwargs in calls]
        if self._combines_alike:
            leaves, spec = pytree.tree_flatten(ensemble(*joined[0], **joined[1]))
            blocks = zip(*(_blocks(leaf, len(calls), batch) for leaf in leaves), strict=True)
            return [pytree.tree_unflatten(block, spec) for block in blocks]
        # a rule may look at the whole batch, so each branch is one
        parts = self._parts(joined, len(calls), batch)
        return [
            combine(ensemble, part, aggregation_of(ensemble, *call)) for part, call in zip(parts, calls, strict=True)
        ]

    def _parts(self, joined: Call, number: int, batch: int) -> list[list[Any]]:
        """What all members return for each of ``number`` calls: leaves of K parts, then their structure."""
        *leaves, spec = outputs_of(self.ensemble, *joined)
        blocks = [list(zip(*(_blocks(y, number, batch) for y in leaf), strict=True)) for leaf in leaves]
        return [[*(list(leaf[i]) for leaf in blocks), spec] for i in range(number)]

    def _joined(self, calls: list[Call], batch: int) -> Call | None:
        """The calls as one, none where they are made one after the other."""
        if not self.together or len(calls) == 1:
            return None
        try:
            joined = side_by_side(calls, batch)
            if not torch.compiler.is_compiling():
                self._hold(joined, calls, batch)
        except Apart as why:
            warnings.warn(f"fastens: branches are evaluated one after the other: {why}", stacklevel=3)
            self.together = False
            return None
        return joined

    def _hold(self, joined: Call, calls: list[Call], batch: int) -> None:
        """Check once for every kind of call that no member mixes the branches' rows."""
        kinds = [(x.shape, x.dtype) if isinstance(x, Tensor) else type(x) for x in pytree.tree_leaves(joined)]
        key = (batch, len(calls), tuple(kinds), self.ensemble.training)
        if key not in self._held and batch:
            check_rows(self.ensemble, joined, calls, batch)
            self._held.add(key)

    def _added(self, x: Tensor, factors: list[Any], parts: Sequence[Tensor]) -> Tensor:
        """The sum on what is predicted; variances beside it are the main call's."""
        main, *branches = parts
        if not branches:
            return main
        channels = 1
        if main.ndim > 1:
            channels = parameterisation.predicted_channels(prediction_of(self.ensemble), x, main.shape)
        wide = torch.promote_types(main.dtype, torch.float32)
        head = main[:, :channels].to(wide) if main.ndim > 1 else main.to(wide)
        total = head
        for factor, branch in zip(factors, branches, strict=True):
            other = branch[:, :channels].to(wide) if branch.ndim > 1 else branch.to(wide)
            total = total + _scaled(factor, head, other)
        total = total.to(main.dtype)
        return total if main.ndim < 2 or channels == main.shape[1] else torch.cat([total, main[:, channels:]], 1)


def mapped(function: Callable[..., Tensor], outputs: Sequence[Any]) -> Any:
    """A function of the scores in outputs of one structure; what is no score is the first's.

    Raises:
        ValueError: another number of scores.
    """
    flat = [pytree.tree_flatten(output) for output in outputs]
    if any(len(leaves) != len(flat[0][0]) for leaves, _ in flat):
        raise ValueError(
            f"compose: networks return {', '.join(str(spec) for _, spec in flat)}, expected one structure; wrap "
            "one in a module that returns what the other does"
        )
    leaves = []
    for column in zip(*(leaves for leaves, _ in flat), strict=True):
        scores = all(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in column)
        leaves.append(function(*column) if scores else column[0])
    return pytree.tree_unflatten(leaves, flat[0][1])


def _blocks(leaf: Any, number: int, batch: int) -> Sequence[Any]:
    """An output of several blocks of rows as those of each; what is no tensor is that of each.

    Raises:
        ValueError: a tensor without rows.
    """
    if not isinstance(leaf, Tensor):
        return [leaf] * number
    if leaf.ndim == 0 or leaf.shape[0] != number * batch:
        raise ValueError(
            f"compose: the members return {list(leaf.shape)} for {number * batch} rows, which are not those of "
            f"{number} branches; compose(..., together=False) evaluates the branches one after the other"
        )
    return leaf.split(batch)


def _scaled(factor: Any, main: Tensor, branch: Tensor) -> Tensor:
    """``factor (main - branch)``, in which a row of factor zero does not look at the branch, NaN or not."""
    if main.shape != branch.shape:
        raise ValueError(
            f"compose: the networks return {list(main.shape)} and {list(branch.shape)}, expected one shape"
        )
    if not isinstance(factor, Tensor):
        return factor * (main - branch)
    shaped = per_sample(factor.reshape(-1) if factor.numel() > 1 else factor.reshape(()), main).to(main.dtype)
    return torch.where(shaped == 0, 0, shaped * (main - branch))
