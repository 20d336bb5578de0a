"""What torch computes of one row and one member in deterministic mode: on one thread, from aligned weights, watched."""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastens.network.of_member import read_through
from fastens.network.state import GlobalDraws, state_kept
from fastens.reproducible import REMEDY, NotReproducible, one_thread

Result = TypeVar("Result")


class _Read:
    """The weights as members read them in calls by torch: from addresses at which cache lines begin."""

    _LINE = 64  # bytes, at which torch allocates

    def __init__(self) -> None:
        self._found: dict[Any, tuple[Tensor, int, int]] = {}

    def __call__(self, weight: Tensor) -> Tensor:
        """Return one member's weight, or a copy, through which gradients go; to members it is one object."""
        key = weight.data_ptr(), weight.shape, weight.stride(), weight.dtype
        if key not in self._found:
            own: Any = weight
            if weight.data_ptr() % self._LINE:
                own = weight.clone()
                own._is_param = isinstance(weight, nn.Parameter)
            self._found[key] = own, own.data_ptr(), _version(own)
        return self._found[key][0]

    @property
    def written(self) -> bool:
        """Whether a member wrote to one, in place or by ``data``."""
        return any((x.data_ptr(), _version(x)) != (address, version) for x, address, version in self._found.values())


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def by_torch(engine: Any, run: Callable[[], Result]) -> Result:
    """Run what torch computes of one row, on one thread; what that leaves behind is undone.

    Raises:
        NotReproducible: it draws random numbers, or leaves something behind in the network.
    """
    before, elsewhere, read = torch.random.get_rng_state(), GlobalDraws(), _Read()
    with ExitStack() as kept:
        changed = [kept.enter_context(state_kept(each)) for each in (engine.network, *engine.views)]
        with one_thread(), read_through(read):
            result = run()
    if engine.stateful or read.written or any(changed):
        raise NotReproducible(f"deterministic: the network writes to itself; {REMEDY}")
    if elsewhere.drawn() or not torch.equal(before, torch.random.get_rng_state()):
        raise NotReproducible(f"deterministic: the network draws random numbers in this mode; {REMEDY}")
    return result


class _Dealt(torch.autograd.Function):
    """A tensor for each member; the gradients that come back are added up in the order of the members."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int) -> tuple[Tensor, ...]:
        """Give it to each."""
        return tuple(x.view_as(x) for _ in range(count))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Add up."""
        return added(grads), None


def added(parts: Sequence[Tensor]) -> Tensor:
    """The sum of some tensors in their order, in float32 at least."""
    wide = torch.promote_types(parts[0].dtype, torch.float32)
    return functools.reduce(torch.add, [part.to(wide) for part in parts]).to(parts[0].dtype)


Deal = Callable[[Tensor, int], Sequence[Tensor]]
_deal: contextvars.ContextVar[Deal] = contextvars.ContextVar("deal", default=_Dealt.apply)


@contextmanager
def dealt_by(deal: Deal) -> Iterator[None]:
    """Let members get the tensors that a function makes for each, through which gradients come back."""
    token = _deal.set(deal)
    try:
        yield
    finally:
        _deal.reset(token)


def for_members(x: Tensor, count: int) -> Sequence[Tensor]:
    """A tensor for each of some members, through which gradients come back."""
    return _deal.get()(x, count)
