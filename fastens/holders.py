"""Where a method that is called without tensors runs: on the network of all members, or on each of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import nn

from fastens.internal import engine_of, modules_apart
from fastens.network.asked import answered
from fastens.network.member_tables import called, settle
from fastens.network.rollback import Rollback
from fastens.network.state import NetworkState

if TYPE_CHECKING:
    from fastens.engine.engine import Engine
    from fastens.ensemble import Ensemble


class Holders:
    """What holds the members' Python state.

    Args:
        ensemble: of the members.
        modules: which hold it; none for those that do now: each member where members have state of their own, else the
            network of all of them.
    """

    def __init__(self, ensemble: Ensemble, modules: list[nn.Module] | None = None) -> None:
        engine = engine_of(ensemble)
        self.ensemble = ensemble
        self._views = modules is None and engine is not None and engine.remember
        if modules is not None:
            self.modules = modules
        elif engine is None:
            self.modules = list(ensemble.network.children())
        else:
            self.modules = engine.views if self._views else [ensemble.network]

    @contextmanager
    def running(self, whole: bool = False) -> Iterator[None]:
        """Scope of code of theirs: what they write is kept, and what rested on what it was is forgotten.

        Members without state of their own get copies of the network's anew: it may be written to where nothing tells.

        Args:
            whole: whether nothing is kept where that code fails.
        """
        engine = engine_of(self.ensemble)
        with nullcontext() if engine is None else engine.turn(), self._running(engine, whole):
            yield

    @contextmanager
    def _running(self, engine: Engine | None, whole: bool) -> Iterator[None]:
        try:
            with called() if self._views else nullcontext(), ExitStack() as scopes:
                if self._views and engine is not None:
                    scopes.enter_context(engine.running())
                elif engine is None:
                    apart = modules_apart(self.ensemble)
                    apart.get()
                    scopes.enter_context(apart.running(range(len(self.modules))))
                for view in self.modules if self._views else ():
                    scopes.enter_context(answered(view))
                if whole:
                    scopes.enter_context(self._undone_by_errors())
                yield
        finally:
            for view in self.modules if self._views else ():
                settle(view, keeps=True)
            if not self._views:
                self.ensemble.refresh()

    @contextmanager
    def _undone_by_errors(self) -> Iterator[None]:
        """Scope that leaves members and weights as they were where it is left by an error."""
        states = [NetworkState(view) for view in self.modules] if self._views else []
        before = Rollback(self.ensemble.network)
        try:
            with before:
                yield
        except BaseException:
            for state in states:
                state.put_back()
            before.restore()
            raise


class Contexts:
    """The context managers that a method gave for all of them, as one.

    Args:
        holders: whose code runs where it is entered and left.
        contexts: one for each.
        returned: makes one value of what each returns.
    """

    def __init__(self, holders: Holders, contexts: list[Any], returned: Callable[[list[Any]], Any]) -> None:
        self._holders, self._contexts, self._returned = holders, contexts, returned

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._contexts[0], name)

    def __enter__(self) -> Any:
        with self._holders.running(), ExitStack() as entered:
            results = [entered.enter_context(each) for each in self._contexts]
            entered.pop_all()
        return self._returned(results)

    def __exit__(self, *error: Any) -> bool:
        handled: list[Any] = []
        with self._holders.running(), ExitStack() as left:
            for each in self._contexts:  # all are told of the same error, and left in reverse order
                left.callback(lambda each=each: handled.append(each.__exit__(*error)))
        return any(handled)


def is_context(value: Any) -> bool:
    """Whether a value is there to be entered, and code of the members may run then: no device, lock, file or mode."""
    library = type(value).__module__.partition(".")[0]
    foreign = library != "contextlib" and (library in sys.stdlib_module_names or library in ("torch", "numpy"))
    return isinstance(value, AbstractContextManager) and not isinstance(value, nn.Module) and not foreign


def in_turn(
    holders: Holders, generators: list[Any], returned: Callable[[list[Any]], Any]
) -> Generator[Any, None, None]:
    """What generators of all of them yield, each time as one value; they end together."""
    try:
        while True:
            with holders.running(whole=True):
                values = [next(each, generators) for each in generators]
            if any(value is generators for value in values):
                return
            yield returned(values)
    finally:
        with holders.running():
            for each in generators:
                each.close()
