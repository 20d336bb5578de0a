"""Whether a model predicts by its library's own code: a subclass that answers otherwise cannot be packed."""

from __future__ import annotations

import inspect
from typing import Any


def check_own_code(model: Any, base: type, *names: str) -> None:
    """Refuse a model where a method or attribute that its prediction goes through is not the one of ``base``.

    Args:
        model: the model.
        base: the library's class.
        names: of methods and properties that ``base.predict`` uses.

    Raises:
        TypeError: one of them, or ``__getattribute__``, is replaced in a subclass or on the object.
    """
    for name in (*names, "__getattribute__"):
        library = inspect.getattr_static(base, name)
        if inspect.getattr_static(model, name, None) is not library:
            raise TypeError(
                f"this {type(model).__name__} has its own {name!r} in place of {base.__name__}'s: a packed forest "
                f"would not answer as it does; pass a {base.__name__}"
            )
