"""Views of an ensemble: the same stacks and engine under another rule."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING

from fastens.internal import views_of

if TYPE_CHECKING:
    from fastens.ensemble import Ensemble


class Views:
    """An ensemble and its views, which are in one mode. A lock, because requests make views while others are called."""

    def __init__(self) -> None:
        self._views: weakref.WeakSet[Ensemble] = weakref.WeakSet()
        self._lock = threading.Lock()

    def add(self, ensemble: Ensemble) -> None:
        """Take in an ensemble, or a view, as long as it lives."""
        with self._lock:
            self._views.add(ensemble)

    def train(self, mode: bool) -> None:
        """Tell all of them the mode of their members."""
        with self._lock:
            for view in self._views:
                view.__dict__["training"] = mode

    def follow(self, ensemble: Ensemble) -> None:
        """Let all of them have the engine and the network that one of them has got."""
        with self._lock:
            for view in self._views:
                view.__dict__.update(
                    {n: ensemble.__dict__[n] for n in ("_engine", "_why_loop") if n in ensemble.__dict__}
                )


def view_of(ensemble: Ensemble) -> Ensemble:
    """Return a view of an ensemble with another rule; network, engine, recordings and trajectories are shared."""
    view = object.__new__(type(ensemble))
    view.__dict__.update(ensemble.__dict__)
    view.__dict__.pop("forward", None)  # what watches the calls of one ensemble knows that one only
    views_of(ensemble).add(view)
    return view
