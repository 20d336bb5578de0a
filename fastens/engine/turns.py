"""Whose turn it is: code of a network or its members that keeps state runs in one thread after the other."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from fastens import reproducible
from fastens.refusals import apart


class Turns:
    """Turns of threads to run the code of one network or of its members.

    A first pass, an audit or a fold that fails puts back what code wrote to the network, and members that remember are
    made anew when the network was written to: in between, no other thread's code may write there or read it. Replays
    of plans run no such code, and wait for nobody, but at their audits. A thread that has its turn may take it again,
    as nested calls do.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        _ALL.add(self)

    def begin(self) -> None:
        """Be nobody's: in a process that was forked, the thread whose turn it was is no more."""
        self._lock = threading.RLock()

    @contextmanager
    def taken(self, device: str = "cpu") -> Iterator[None]:
        """Scope of this thread's turn.

        In deterministic mode, whose rows set the process's number of threads, that turn is taken first, always in this
        order. The threads in which autograd goes back through a device do not wait: the one whose turn it is may be
        waiting for them.

        Args:
            device: the kind of device that the network is on.
        """
        backward = device != "cpu" and torch._C._current_graph_task_id() != -1
        with reproducible.one_at_a_time() if reproducible.enabled() else nullcontext(), apart():
            lock = self._lock
            mine = lock.acquire(blocking=not backward)
            try:
                yield
            finally:
                if mine:
                    lock.release()


def _begin_all() -> None:
    for each in list(_ALL):
        each.begin()


_ALL: weakref.WeakSet[Turns] = weakref.WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_all)
