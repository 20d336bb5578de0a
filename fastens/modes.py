"""Modes and places of a user's module, set by its own methods.

``train()``, ``eval()`` and ``to()`` of :class:`torch.nn.Module` return the module; those of a user's class may return
nothing. So they are called here, and the module that they were called on is what comes back.
"""

from typing import Any, TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def evaluating(module: M) -> M:
    """Put a module into evaluation mode, by its own ``eval()``, and return it."""
    module.eval()
    return module


def in_mode(module: M, training: bool) -> M:
    """Put a module into a mode, by its own ``train()``, and return it."""
    module.train(training)
    return module


def moved(module: M, *args: Any, **kwargs: Any) -> M:
    """Convert a module in place, by its own ``to()``, whose arguments these are, and return it."""
    module.to(*args, **kwargs)
    return module
