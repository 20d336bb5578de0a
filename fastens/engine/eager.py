"""What torch computes of one row and one member in deterministic mode: on one thread, from aligned weights, watched."""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastens.network.member_tables import read_through
from fastens.network.state import GlobalDraws, TorchDraws, state_kept
from fastens.reproducible import REMEDY, NotReproducible, one_thread
from fastens.scopes import scope

Result = TypeVar("Result")


class _Read:
    """Weights as eager rows read them.

    At addresses where cache lines begin, since the last bits of MKL depend on it.
    """

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


def eagerly(engine: Any, run: Callable[[], Result]) -> Result:
    """Return what ``run`` computes of one row by torch, on one thread; what it leaves in the network is undone.

    Raises:
        NotReproducible: it draws random numbers, or leaves something behind in the network.
    """
    draws, elsewhere, read = TorchDraws(), GlobalDraws(), _Read()
    with ExitStack() as kept:
        changed = [kept.enter_context(state_kept(each)) for each in (engine.network, *engine.views)]
        with one_thread(), read_through(read):
            result = run()
    if engine.behaviour.writes_itself or read.written or any(changed):
        raise NotReproducible(f"deterministic: the network writes to itself; {REMEDY}")
    if elsewhere.drawn() or draws.drawn():
        raise NotReproducible(f"deterministic: the network draws random numbers in this mode; {REMEDY}")
    return result


class _Replicas(torch.autograd.Function):
    """A copy of a tensor for each member; gradients are summed in member order, so that their last bits are fixed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int) -> tuple[Tensor, ...]:
        """Return ``count`` views."""
        return tuple(x.view_as(x) for _ in range(count))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Return the sum of the members' gradients."""
        return added(grads), None


def added(parts: Sequence[Tensor]) -> Tensor:
    """The sum of some tensors in their order, in float32 at least."""
    wide = torch.promote_types(parts[0].dtype, torch.float32)
    return functools.reduce(torch.add, [part.to(wide) for part in parts]).to(parts[0].dtype)


Replicate = Callable[[Tensor, int], Sequence[Tensor]]
_replicate: contextvars.ContextVar[Replicate] = contextvars.ContextVar("replicate", default=_Replicas.apply)


def replicated_by(deal: Replicate) -> AbstractContextManager[Replicate]:
    """Scope in which ``replicate`` makes the members' copies of a tensor.

    Over a mesh, gradients come from all ranks.
    """
    return scope(_replicate, deal)


def replicas_for(x: Tensor, count: int) -> Sequence[Tensor]:
    """Return a copy of a tensor for each of ``count`` members; their gradients come back summed in member order."""
    return _replicate.get()(x, count)
