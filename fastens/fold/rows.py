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
        self.fills = False  # whether a first call changes a member's own state, as one that fills a cache does
        self.counts = False  # whether another changes it again

    def clear(self) -> None:
        """Forget what was established."""
        self._found.clear()
        self.fills = self.counts = False

    def independent(self, engine: FoldEngine, arguments: Arguments, method: str = "forward") -> bool:
        """Whether every row of a call is evaluated by itself."""
        return self.excluded(engine, arguments, method) is not None

    def excluded(self, engine: FoldEngine, arguments: Arguments, method: str = "forward") -> frozenset[int] | None:
        """Positions of the leaves that only look like the batch; none where the rows of a call are mixed."""
        key = (method, arguments.signature(), engine.network.training)
        if key not in self._found:
            fills, counts = _changes(engine, arguments, method)
            self.fills, self.counts = self.fills or fills, self.counts or counts
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

        def answer(given: Arguments) -> list[Any]:
            view = engine.views[0]
            with state_kept(view), state_kept(engine.network):
                return pytree.tree_leaves(engine.call_module(view, 0, given, method))

        whole = answer(drawn)
        if not all(x.ndim and x.shape[0] == batch for x in whole if isinstance(x, Tensor)):
            return None
        if batch <= 1:
            return frozenset()
        pairs = zip(answer(drawn), whole, strict=True)
        if any(relative_error(a, b) > 0 for a, b in pairs if isinstance(b, Tensor)):
            return frozenset()  # random in this mode, so that only sizes tell
        rows = sorted({0, batch - 1})
        for excluded in _hypotheses(arguments):
            if _explains(engine, drawn.excluding(excluded), whole, rows, answer):
                return excluded
    return None


def _changes(engine: FoldEngine, arguments: Arguments, method: str) -> tuple[bool, bool]:
    """Whether a first call changes a member's own state, and whether a second does."""
    view = engine.views[0]
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    kept = state_kept(view), state_kept(engine.network)
    with torch.no_grad(), torch.random.fork_rng(devices=devices), kept[0] as first, kept[1] as ours:
        engine.call_module(view, 0, arguments, method)
        with state_kept(view) as again, state_kept(engine.network) as ours_again:
            engine.call_module(view, 0, arguments, method)
    return bool(first | ours), bool(again | ours_again)


def _hypotheses(arguments: Arguments) -> Iterator[frozenset[int]]:
    others = sorted(arguments.rows_at - {arguments.primary})
    yield frozenset()
    if others:
        yield from (frozenset({i}) for i in others)
        if len(others) > 1:
            yield frozenset(others)


def _explains(engine: FoldEngine, given: Arguments, whole: list[Any], rows: list[int], answer: Any) -> bool:
    for row in rows:
        try:
            part = answer(given.selected(torch.tensor([row])))
        except Exception:  # a form that the member does not take
            return False
        if len(part) != len(whole):
            return False
        for a, b in zip(part, whole, strict=True):
            if not isinstance(b, Tensor):
                if type(a) is not type(b) or not (a is b or a == b):
                    return False
            elif not relative_error(a, b[row : row + 1]) <= 10 * tolerance_for(b, engine.network):
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
