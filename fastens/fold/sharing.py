"""Which tensors of a pass share memory, where that follows from a layout, and a member's tensors have other layouts.

``h.reshape(...)`` or ``h.contiguous()`` is ``h`` seen again in one layout, and a copy in another. What is written to
one of the two then reaches the other in a pass of all members and in no member, or the other way round; only values
that the write changes show it. So a pass that writes to such tensors is held against one member, function by function.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastens.fold.names import named
from fastens.fold.nested import leaves_of
from fastens.fold.tensor import MemberTensor, NotFoldable, memory_of
from fastens.fold.writes import written_by
from fastens.scopes import scope

_BY_LAYOUT = set(
    named(
        "view view_as reshape reshape_as flatten unflatten ravel contiguous to type type_as cpu cuda float double half",
        "bfloat16 int long bool short conj real imag pixel_shuffle pixel_unshuffle channel_shuffle",
    )
)


class Sharing(TorchFunctionMode):
    """What a network's own Python makes by functions whose results may share memory; the mode of a member's run.

    Attributes:
        calls: the functions in order, and whether the result is in the memory of the first argument.
        written: the numbers of the calls whose argument or result was written to afterwards.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, bool]] = []
        self.written: set[int] = set()
        self._involved: dict[int | None, set[int]] = {}  # calls by memory

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return self.noted(func, args, kwargs, lambda: func(*args, **kwargs))

    def noted(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], run: Callable[[], Any]) -> Any:
        """What ``run`` gives, which calls the function."""
        for target in written_by(func, args, kwargs):
            self.written |= self._involved.get(_memory(target), set())
        if func not in _BY_LAYOUT:
            return run()
        given = next((x for x in leaves_of((args[:1], kwargs)) if isinstance(x, Tensor)), None)
        before = None if given is None else _memory(given)
        result = run()
        if given is not None and before is not None and given.ndim and isinstance(result, Tensor):
            after = _memory(result)
            for memory in {before, after} - {None}:
                self._involved.setdefault(memory, set()).add(len(self.calls))
            self.calls.append((func, before == after))
        return result

    def alike(self, other: Sharing) -> bool:
        """Whether what was written to shares memory, or not, with the same as in another run of the same code."""
        same = [func for func, _ in self.calls] == [func for func, _ in other.calls]
        return same and all(self.calls[i] == other.calls[i] for i in self.written)


def _memory(x: Tensor) -> int | None:
    return memory_of(x.stack if isinstance(x, MemberTensor) else x)


_NOTED: contextvars.ContextVar[list[Sharing] | None] = contextvars.ContextVar("sharing", default=None)


@contextmanager
def sharing_noted() -> Iterator[list[Sharing]]:
    """Scope in which every new pass notes what shares memory in it."""
    passes: list[Sharing] = []
    with scope(_NOTED, passes):
        yield passes


def sharing_of_pass() -> Sharing | None:
    """What a new pass notes; none outside of such a scope."""
    passes = _NOTED.get()
    if passes is None:
        return None
    passes.append(Sharing())
    return passes[-1]


def check_sharing(passes: list[Sharing], member: Callable[[], Any]) -> None:
    """Hold what passes wrote to against a member.

    Args:
        passes: what each noted.
        member: runs one member, with arguments of its own; called where a pass wrote to what may share memory.

    Raises:
        NotFoldable: a write reaches what it does not reach in the member, or the other way round.
    """
    writing = [each for each in passes if each.written]
    if not writing:
        return
    with Sharing() as theirs:
        member()
    if not all(each.alike(theirs) for each in writing):
        raise NotFoldable("the network writes to what is a view in one layout and a copy in another")
