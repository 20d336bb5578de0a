"""A rule from one function."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from inspect import Parameter
from typing import Any, overload

from torch import Tensor

from fastens.rules.base import Rule

Definition = Callable[..., Tensor]


@overload
def rule(name: Definition, /) -> type[Rule]: ...


@overload
def rule(name: str | None = None, /) -> Callable[[Definition], type[Rule]]: ...


def rule(name: Definition | str | None = None, /) -> type[Rule] | Callable[[Definition], type[Rule]]:
    """Make a rule of a function of the members' scores.

    ``@fastens.rule("trimmed")``, or ``@fastens.rule`` for the function's own name. The function takes scores
    [K, B, ...] in float32 or float64 and returns [B, ...], in torch operations; its other arguments, with their
    defaults, are the rule's parameters. What it becomes is called with parameters to make a value,
    ``trimmed(drop=2)``, which goes wherever a rule goes; the name stands for the defaults. Wherever no kernel knows a
    rule its definition is run.

    Raises:
        TypeError: no function, one without an argument for the scores, parameters without defaults or with ones that
            JSON does not keep.
        ValueError: a name that another rule has, or that is none; a parameter named as an attribute of rules.
    """
    if callable(name):
        return _made(name, name.__name__)
    if not isinstance(name, str | None):
        raise TypeError(f"rule: the name is a {type(name).__name__}, expected a string")
    return lambda function: _made(function, function.__name__ if name is None else name)


def _made(function: Definition, name: str) -> type[Rule]:
    if not inspect.isfunction(function):
        raise TypeError(f"rule: expected a function of scores, got {function!r}")
    parameters = list(inspect.signature(function).parameters.values())
    if not parameters or parameters[0].kind not in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD):
        raise TypeError(f"rule {name!r}: the function's first argument takes the scores [K, B, ...]; it has none")
    del parameters[0]
    for parameter in parameters:
        if parameter.kind not in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY):
            raise TypeError(f"rule {name!r}: {parameter} has no name to be kept under, expected named parameters")
        if parameter.default is Parameter.empty:
            raise TypeError(f"rule {name!r}: parameter {parameter.name} has no default, expected one")
        if hasattr(Rule, parameter.name) or parameter.name in ("name", "rule"):
            raise ValueError(f"rule {name!r}: parameter {parameter.name} is an attribute of rules; name it otherwise")
    keys = [parameter.name for parameter in parameters]

    def combine(self: Rule, scores: Tensor) -> Tensor:
        return function(scores, **{key: getattr(self, key) for key in keys})

    namespace = {
        "__doc__": function.__doc__,
        "__module__": function.__module__,
        "__qualname__": function.__qualname__,
        "combine": combine,
        "name": name,
    }
    fields = [(p.name, Any if p.annotation is Parameter.empty else p.annotation, p.default) for p in parameters]
    made = dataclasses.make_dataclass(function.__name__, fields, bases=(Rule,), namespace=namespace, frozen=True)
    made.__module__ = function.__module__  # newer versions of Python put this module there
    made()  # defaults that JSON does not keep are an error here
    return made
