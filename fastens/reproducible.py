"""Whether a row's result may depend on how the work is cut: a setting of the process, or of a block of code."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fastens.scopes import Blocks

_OWN: Blocks[bool] = Blocks("fastens.deterministic")
_of_process = False
_blocks = 0  # that are open with the mode on, in all threads
_anywhere = False  # the mode is on in the process, or in a block
_ever = False  # it was: a task keeps the mode of where it was made, however long it lives
_ONE_AT_A_TIME = threading.RLock()  # the number of threads is the process's


REMEDY = "call it inside `with fastens.deterministic(False):`"


class NotReproducible(RuntimeError):
    """A call whose rows cannot keep their bits."""


class deterministic:
    """Let the result of a row depend on that row alone, to the bit: not on the batch, its other rows, or the threads.

    As a call it is a setting of the process, which holds in all threads: ``fastens.deterministic(True)``. As a context
    manager it holds inside the block, in the thread or task that enters it.

    The bits are those of one machine's instruction set and of one build of torch and of fastens. What cannot keep the
    promise raises: rows that a network mixes, networks that write to themselves or draw random numbers,
    ``torch.compile`` and the transforms of ``torch.func``.

    Args:
        mode: whether it does.
    """

    def __init__(self, mode: bool = True) -> None:
        self._mode, self._before = bool(mode), _of_process
        _set(self._mode)

    def __enter__(self) -> None:
        """Make it the block's."""
        _set(self._before, self._mode)
        self._block = _OWN.block(None, self._mode)
        self._block.__enter__()

    def __exit__(self, *error: Any) -> None:
        """Leave the block."""
        _set(_of_process, -self._mode)
        self._block.__exit__(*error)


def _set(of_process: bool, blocks: int = 0) -> None:
    global _of_process, _blocks, _anywhere, _ever
    with _ONE_AT_A_TIME:
        _of_process, _blocks = of_process, _blocks + blocks
        _anywhere = _of_process or _blocks > 0
        _ever |= _anywhere


def enabled() -> bool:
    """Whether rows keep their bits, here and now; in a trace, whose result is for all, whether they do anywhere."""
    if not _ever:
        return False
    if torch.compiler.is_compiling():
        return _anywhere
    own = _OWN.of(None)
    return _of_process if own is None else own


def one_at_a_time() -> threading.RLock:
    """Scope in which no other thread of the process sets the mode or the number of threads."""
    return _ONE_AT_A_TIME


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on one thread: where several share an operation, their borders change last bits."""
    with _ONE_AT_A_TIME:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)
