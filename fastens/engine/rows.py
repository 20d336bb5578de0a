"""Which arguments of a call carry rows that are evaluated each by itself: established by evidence from a member."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fastens.engine.arguments import Arguments
from fastens.engine.check import HALVES, relative_error, tolerance_for
from fastens.engine.objects import objects_kept
from fastens.engine.structure import uncounted
from fastens.network.state import random_kept, state_kept
from fastens.network.tables import converted, seen_as

if TYPE_CHECKING:
    from fastens.engine.folding import FoldedMembers

_MOST = 256  # signatures
_NOTHING = 0.02  # of the size of weights that layers begin with
_EXACT = 1e-5  # of float64, where a network may go through float32


class RowsOfMembers:
    """Which arguments carry rows, by signature, as a member's answers to some rows of a call have shown."""

    def __init__(self) -> None:
        self._found: dict[tuple[Any, ...], frozenset[int] | None] = {}

    def clear(self) -> None:
        """Forget what was established."""
        self._found.clear()

    def independent(self, engine: FoldedMembers, arguments: Arguments, method: str = "forward") -> bool:
        """Whether every row of a call is evaluated by itself."""
        return self.excluded(engine, arguments, method) is not None

    def excluded(self, engine: FoldedMembers, arguments: Arguments, method: str = "forward") -> frozenset[int] | None:
        """Positions of the leaves that only look like the batch; none where the rows of a call are mixed."""
        key = _key(engine, arguments, method)
        if key not in self._found:
            with engine.turn(), uncounted():
                found = _established(engine, arguments, method)
            if len(self._found) > _MOST:
                self._found.clear()
            for each in (key, _key(engine, arguments, method)):  # a network may write to itself as it is called
                self._found[each] = found
        return self._found[key]

    def known(self, engine: FoldedMembers, arguments: Arguments, method: str = "forward") -> bool:
        """Whether calls have shown it."""
        return _key(engine, arguments, method) in self._found

    def mix(self, engine: FoldedMembers, arguments: Arguments, method: str) -> None:
        """Keep that rows of such calls may be mixed."""
        self._found[_key(engine, arguments, method)] = None

    def part(self, engine: FoldedMembers, arguments: Arguments, start: int, stop: int) -> Arguments:
        """The arguments of some rows of a call whose rows are independent."""
        excluded = self.excluded(engine, arguments) or frozenset()
        return arguments.excluding(excluded).selected(torch.arange(start, stop))


def _key(engine: FoldedMembers, arguments: Arguments, method: str) -> tuple[str, Any, bool, Any]:
    return method, arguments.signature(), engine.network.training, engine.state_of_python


def _established(engine: FoldedMembers, arguments: Arguments, method: str) -> frozenset[int] | None:
    """Hold a member's answer to single rows against its answer to all, on drawn numbers, where rows differ.

    In float64, since rounding would hide a weak mixing of rows; in the member's own precision where it takes no other.
    Where weights are nearly zero, as those of new layers are, also on drawn ones in their place: training changes them.
    """
    fresh = _nearly_zero(engine)
    with torch.no_grad(), random_kept(), objects_kept(arguments):
        drawn = drawn_like(arguments)
        for numbers in (_told_apart(drawn, raised=True), _told_apart(drawn), drawn):
            doubled = numbers.with_tensors([_double(x) for x in numbers.tensors])
            for given, exact in ((doubled, True), (numbers, False)):
                try:
                    found = _Member(engine, method, given, exact)
                    return found.excluded(_Member(engine, method, given, exact, fresh).explains if fresh else _any)
                except Exception:  # it casts itself, or is scripted; or it takes no other numbers, which shows nothing
                    continue
    return None


class _Member:
    """The first member's answers to a call and to single rows of it.

    Args:
        engine: of the members.
        method: what is called.
        given: the arguments.
        exact: whether weights are read in float64.
        fresh: how large the noise is that is drawn in the place of stacks, by their identity.
    """

    def __init__(
        self, engine: FoldedMembers, method: str, given: Arguments, exact: bool, fresh: dict[int, float] | None = None
    ) -> None:
        self._engine, self._method, self._given, self._exact = engine, method, given, exact
        self._fresh = fresh or {}
        self._whole = self._answer(given)
        tensors = [x for x in self._whole if isinstance(x, Tensor)]
        half = any(x.dtype in HALVES for x in tensors)
        self._tolerance = 0.0 if half else _EXACT if exact else max(map(tolerance_for, tensors), default=0.0)

    def _answer(self, given: Arguments) -> list[Any]:
        engine = self._engine
        view, device = engine.view(0), given.batch.device.type
        seen = seen_as(self._read) if self._exact or self._fresh else nullcontext()
        precise = torch.autocast(device, enabled=False) if self._exact else nullcontext()
        with state_kept(engine.network) as written, state_kept(view) as changed, seen, precise:
            output = engine.call_module(view, 0, given, self._method)
        engine.behaviour.writes_itself = engine.behaviour.writes_itself or bool(changed or written)
        return pytree.tree_leaves(output)

    def _read(self, stack: Tensor) -> Tensor:
        """What is read in the place of a stack."""
        if id(stack) not in self._fresh:
            return _double(stack) if self._exact else stack
        generator, dtype = torch.Generator(stack.device).manual_seed(1), torch.float64 if self._exact else stack.dtype
        with torch._C.DisableTorchFunction():
            noise = torch.randn(stack.shape, generator=generator, dtype=dtype, device=stack.device)
            return torch.nn.Parameter(noise * self._fresh[id(stack)], stack.requires_grad)

    def excluded(self, agrees: Callable[[frozenset[int]], bool]) -> frozenset[int] | None:
        """Positions of the leaves that only look like the batch; none where the rows are mixed.

        Args:
            agrees: whether other evidence is for them, too.
        """
        given, whole, batch = self._given, self._whole, self._given.batch_size
        if not all(x.ndim and x.shape[0] == batch for x in whole if isinstance(x, Tensor)):
            return None
        if batch <= 1:
            return frozenset()
        if not all(_same(a, b, 0.0) for a, b in zip(self._answer(given), whole, strict=True)):
            return frozenset()  # random in this mode, so that only sizes tell
        return next((found for found in _hypotheses(given) if self.explains(found) and agrees(found)), None)

    def explains(self, excluded: frozenset[int]) -> bool:
        """Whether single rows get what they get among all, where these leaves only look like the batch."""
        given, batch = self._given.excluding(excluded), self._given.batch_size
        for row in sorted({0, batch // 2, batch - 1}):
            try:
                part = self._answer(given.selected(torch.tensor([row])))
            except Exception:  # a form that the member does not take
                return False
            if len(part) != len(self._whole):
                return False
            whole = [x[row : row + 1] if isinstance(x, Tensor) else x for x in self._whole]
            if not all(_same(a, b, self._tolerance) for a, b in zip(part, whole, strict=True)):
                return False
        return True


def _any(excluded: frozenset[int]) -> bool:
    return True


def _nearly_zero(engine: FoldedMembers) -> dict[int, float]:
    """The weights that are next to nothing beside what layers begin with, by identity, and how large that is."""
    found: dict[int, float] = {}
    for name, p in engine.network.named_parameters():
        if p.is_floating_point() and p.numel() and not name.endswith("bias"):
            usual = 0.5 / max(1, p.shape[2:].numel()) ** 0.5
            if float(p.detach().float().square().mean().sqrt()) < _NOTHING * usual:
                found[id(p)] = usual
    return found


def _same(a: Any, b: Any, tolerance: float) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return relative_error(a, b) <= tolerance
    return type(a) is type(b) and bool(a is b or a == b)


def _hypotheses(arguments: Arguments) -> Iterator[frozenset[int]]:
    others = sorted(arguments.rows_at - {arguments.primary})
    yield frozenset()
    if others:
        yield from (frozenset({i}) for i in others)
        if len(others) > 1:
            yield frozenset(others)


def _double(tensor: Tensor) -> Tensor:
    return converted(tensor, torch.float64) if tensor.is_floating_point() else tensor


def _told_apart(arguments: Arguments, raised: bool = False) -> Arguments:
    """The same call whose rows differ in their times, classes and flags: what reads those of one row would not show.

    They are lower than they were, and none is negative: a network has tables for those. It may have none for more, for
    which an accelerator has no error that a process outlives.

    Args:
        arguments: of the call.
        raised: whether ones are among them where all are zero, on a CPU.
    """
    rows = arguments.batch_size

    def lower(x: Tensor) -> Tensor:
        if x.shape != (rows,) or x.is_floating_point() or x.is_complex() or len(x.unique()) == rows:
            return x
        row = torch.arange(rows, device=x.device)
        if x.dtype is torch.bool:
            return x ^ (row % 2 == 1)
        if raised and x.device.type == "cpu" and not x.any():
            return (row % 2).to(x.dtype)
        return torch.where(x > 0, (x - row).remainder(x.clamp_min(0) + 1), x).to(x.dtype)

    return arguments.with_tensors([lower(x) for x in arguments.tensors])


def drawn_like(arguments: Arguments) -> Arguments:
    """The same call on other numbers, so that no row is by chance like another.

    They are nearer to zero by a tenth at most: times and noise levels stay among those that a network has tables for.
    """

    def draw(x: Tensor) -> Tensor:
        if not x.is_floating_point() or not x.numel():
            return x
        wide = x.detach().double().nan_to_num()
        if not bool(wide.any()):
            wide = wide + 1e-4 * torch.randn(x.shape, dtype=torch.float64, device=x.device)
        return (wide * (1 - 0.1 * torch.rand(x.shape, dtype=torch.float64, device=x.device))).to(x.dtype)

    return arguments.with_tensors([draw(x) for x in arguments.tensors])
