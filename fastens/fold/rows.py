"""Which arguments of a call carry rows that are evaluated each by itself: established by evidence from a member."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fastens.fold.arguments import Arguments
from fastens.fold.check import relative_error, tolerance_for
from fastens.fold.network import state_kept

if TYPE_CHECKING:
    from fastens.fold.engine import FoldEngine

_MOST = 256  # signatures


class RowsOfMembers:
    """What a member's answers to some of its rows say about the arguments, by kind of call."""

    def __init__(self) -> None:
        self._found: dict[Any, frozenset[int] | None] = {}

    def clear(self) -> None:
        """Forget what was established."""
        self._found.clear()

    def independent(self, engine: FoldEngine, arguments: Arguments, method: str = "forward") -> bool:
        """Whether every row of a call is evaluated by itself."""
        return self.excluded(engine, arguments, method) is not None

    def excluded(self, engine: FoldEngine, arguments: Arguments, method: str = "forward") -> frozenset[int] | None:
        """Positions of the leaves that only look like the batch; none where the rows of a call are mixed."""
        key = (method, arguments.signature(), engine.network.training)
        if key not in self._found:
            found = _established(engine, arguments, method)
            if len(self._found) > _MOST:
                self._found.clear()
            self._found[key] = found
        return self._found[key]

    def part(self, engine: FoldEngine, arguments: Arguments, start: int, stop: int) -> Arguments:
        """The arguments of some rows of a call whose rows are independent."""
        excluded = self.excluded(engine, arguments) or frozenset()
        return arguments.excluding(excluded).selected(torch.arange(start, stop))


def _established(engine: FoldEngine, arguments: Arguments, method: str) -> frozenset[int] | None:
    """Hold a member's answer to single rows against its answer to all, on drawn numbers, where rows differ."""
    batch = arguments.batch_size
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        drawn = _drawn(arguments)

        def answer(given: Arguments) -> list[Tensor]:
            view = engine.views[0]
            with state_kept(view), state_kept(engine.network):
                output = engine.call_module(view, 0, given, method)
            return [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor)]

        whole = answer(drawn)
        if not all(x.ndim and x.shape[0] == batch for x in whole):
            return None
        if batch <= 1:
            return frozenset()
        if any(relative_error(a, b) > 0 for a, b in zip(answer(drawn), whole, strict=True)):
            return frozenset()  # random in this mode, so that only sizes tell
        rows = sorted({0, batch - 1})
        for excluded in _hypotheses(arguments):
            if _explains(engine, drawn.excluding(excluded), whole, rows, answer):
                return excluded
    return None


def _hypotheses(arguments: Arguments) -> Iterator[frozenset[int]]:
    others = sorted(arguments.rows_at - {arguments.primary})
    yield frozenset()
    if others:
        yield from (frozenset({i}) for i in others)
        if len(others) > 1:
            yield frozenset(others)


def _explains(engine: FoldEngine, given: Arguments, whole: list[Tensor], rows: list[int], answer: Any) -> bool:
    for row in rows:
        try:
            part = answer(given.selected(torch.tensor([row])))
        except Exception:  # a form that the member does not take
            return False
        if len(part) != len(whole):
            return False
        for a, b in zip(part, whole, strict=True):
            if not relative_error(a, b[row : row + 1]) <= 10 * tolerance_for(b, engine.network):
                return False
    return True


def _drawn(arguments: Arguments) -> Arguments:
    """The same call on other numbers, of the size that they have, so that no row is by chance like another."""

    def draw(x: Tensor) -> Tensor:
        if not x.is_floating_point() or not x.numel():
            return x
        wide = x.detach().double()
        spread = wide.abs().mean().clamp(min=1e-3) if bool(torch.isfinite(wide).all()) else wide.new_ones(())
        return (wide.nan_to_num() + 0.1 * spread * torch.randn(x.shape, dtype=torch.float64, device=x.device)).to(
            x.dtype
        )

    return arguments.with_tensors([draw(x) for x in arguments.tensors])
