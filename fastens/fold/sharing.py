"""Which tensors of a pass share memory, where that follows from a layout, and a member's tensors have other layouts.

``h.reshape(...)`` or ``h.contiguous()`` is ``h`` seen again in one layout, and a copy in another. What is written to
one of the two then reaches the other in a pass of all members and in no member, or the other way round; only values
that the write changes show it. So a pass that writes to such tensors is held against one member, function by function,
but where nobody has the other any more, as of an image that is flattened for a layer that works in place.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from fastens.fold.names import named
from fastens.fold.nested import leaves_of
from fastens.fold.tensor import BORN, MemberTensor, NotFoldable, memory_of
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
        written: the numbers of the calls whose argument or result was written to while the other was there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, bool]] = []
        self.written: set[int] = set()
        self._involved: dict[int | None, list[tuple[int, _Other]]] = {}  # by memory calls, each with the other tensor
        self._born = BORN.get()  # in a pass, whose recording holds their memory to its end

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return self.noted(func, args, kwargs, lambda: func(*args, **kwargs))

    def noted(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], run: Callable[[], Any]) -> Any:
        """What ``run`` gives, which calls the function."""
        for target in written_by(func, args, kwargs):
            self._write(_memory(target))
        if func not in _BY_LAYOUT:
            return run()
        given = next((x for x in leaves_of((args[:1], kwargs)) if isinstance(x, Tensor)), None)
        before = None if given is None else _memory(given)
        result = run()
        if given is not None and before is not None and given.ndim and isinstance(result, Tensor):
            after, number = _memory(result), len(self.calls)
            if after is not None:
                self._involved.setdefault(before, []).append((number, _Other(result, after)))
                self._involved.setdefault(after, []).append((number, _Other(given, before)))
            self.calls.append((func, before == after))
        return result

    def _write(self, memory: int | None) -> None:
        """Take note of a write, which may reach what is a copy of its memory here, or a copy of such a copy."""
        waiting, seen, numbers, there = [memory], {memory}, set[int](), False
        while waiting:
            for number, other in self._involved.get(waiting.pop(), ()):
                numbers.add(number)
                if other.memory not in seen:
                    seen.add(other.memory)
                    waiting.append(other.memory)
                    there = there or self._is_there(other)
        self.written |= numbers if there else {number for number in numbers if self.calls[number][1]}

    def _is_there(self, other: _Other) -> bool:
        """Whether anybody still has a tensor in its memory; a graph may, where gradients are enabled."""
        if self._born is None or not other.passing or torch.is_grad_enabled() or other.storage.expired():
            return not other.storage.expired()
        return any(x is not None and _memory(x) == other.memory for x in (each() for each in self._born.values()))

    def alike(self, other: Sharing) -> bool:
        """Whether what was written to shares memory, or not, with the same as in another run of the same code."""
        if [func for func, _ in self.calls] != [func for func, _ in other.calls]:
            return False
        apart = [i for i, (ours, theirs) in enumerate(zip(self.calls, other.calls, strict=True)) if ours != theirs]
        return not any(i in (other if self.calls[i][1] else self).written for i in apart)  # where it was a copy


def _memory(x: Tensor) -> int | None:
    return memory_of(x.stack if isinstance(x, MemberTensor) else x)


class _Other:
    """A tensor in some memory, which is not held by it.

    Attributes:
        passing: whether it is of a pass, made in it.
    """

    def __init__(self, x: Tensor, memory: int) -> None:
        self.memory, born = memory, (BORN.get() or {}).get(id(x))
        self.passing = born is not None and born() is x
        with torch._C.DisableTorchFunction():
            self.storage = StorageWeakRef((x.stack if isinstance(x, MemberTensor) else x).untyped_storage())


_NOTED: contextvars.ContextVar[list[Sharing] | None] = contextvars.ContextVar("sharing", default=None)


@contextmanager
def sharing_noted() -> Iterator[list[Sharing]]:
    """Scope in which every new pass notes what shares memory in it."""
    passes: list[Sharing] = []
    with scope(_NOTED, passes), scope(BORN, {}):
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
