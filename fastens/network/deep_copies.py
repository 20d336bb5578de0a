"""Deep copies of networks and their state, of what ``copy`` refuses or takes apart too."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from fastens.fold.tensor import modules_of
from fastens.network.snapshots import thread_locals

T = TypeVar("T")


def copied(value: T, memo: dict[int, Any] | None = None) -> T:
    """Copy a network or its state, with what ``copy`` refuses or leaves apart.

    What is kept for each thread comes as this one has it, and a dictionary whose items are its attributes stays one.
    """
    memo = {} if memo is None else memo
    try:
        return _copied(value, dict(memo))
    except TypeError:
        found = thread_locals(value)
        if not found:
            raise
    for kept in found:
        memo[id(kept)] = own = threading.local()
        vars(own).update(copy.deepcopy(vars(kept), memo))
    return _copied(value, memo)


def _copied(value: T, memo: dict[int, Any]) -> T:
    if isinstance(value, torch.nn.Module):
        _add_empty(value, memo)
    made = copy.deepcopy(value, memo)
    for each in memo.get(id(memo), ()):  # what was copied, which ``copy`` keeps there
        if isinstance(each, dict) and getattr(each, "__dict__", None) is each:
            own = memo[id(each)]
            object.__setattr__(own, "__dict__", own)
    return made


def _add_empty(network: torch.nn.Module, memo: dict[int, Any]) -> None:
    """Add copies of the empty containers of its modules; ``copy`` takes more than half its time for them.

    They are tables of hooks, of buffers and of modules, of which most are empty.
    """
    for _, module in modules_of(network):
        for each in vars(module).values():
            kind = type(each)
            if kind is OrderedDict and not each and not vars(each):
                memo.setdefault(id(each), OrderedDict())
            elif (kind is dict or kind is set) and not each:
                memo.setdefault(id(each), kind())


@contextmanager
def outliving() -> Iterator[None]:
    """Scope in which no tensor is made an inference tensor."""
    grad = torch.is_grad_enabled()  # which leaving inference mode would enable
    with torch.inference_mode(False), torch.set_grad_enabled(grad):
        yield


def undisturbed(make: Callable[[], T]) -> T:
    """Return ``make()``, called again where another thread changed what it iterates over meanwhile.

    It outlives a call in inference mode, so no tensor of it is an inference tensor.
    """
    while True:
        try:
            with outliving():
                return make()
        except RuntimeError as error:
            if "changed size during iteration" not in str(error):
                raise
