"""Rules by name: the paper's, those of users, and those of installed packages."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastens.rules.alternating import Alternating
from fastens.rules.base import ALIASES, REGISTRY, Rule
from fastens.rules.dominant import Dominant
from fastens.rules.geometric import Geometric
from fastens.rules.max_abs import MaxAbs
from fastens.rules.mean import Mean
from fastens.rules.median import Median
from fastens.rules.mixture import Mixture
from fastens.rules.noise_dependent_mean import NoiseDependentMean
from fastens.rules.sum import Sum

ENTRY_POINTS = "fastens.rules"  # the group by which a package names rules: name of the rule -> the rule
RULES: Mapping[str, type[Rule]] = {
    cls.name: cls for cls in (Mean, Sum, Median, Geometric, Dominant, MaxAbs, Alternating, Mixture)
}
_DEFAULTS: dict[str, Rule] = {
    **{name: cls() for name, cls in RULES.items()},
    **{alias: RULES[name]() for alias, name in ALIASES.items()},
}


def names() -> tuple[str, ...]:
    """Return the names of the paper's rules, without aliases."""
    return tuple(RULES)


def get(rule: str | Rule) -> Rule:
    """Return the rule that a name or an alias stands for, with default parameters; a rule is returned as it is.

    Rules of users are known once they are defined, those of installed packages by their entry points in the group
    ``fastens.rules``.

    Raises:
        ValueError: no rule has this name (the nearest names are offered), or its parameters have no defaults.
        TypeError: ``rule`` is neither a name nor a rule.
    """
    if isinstance(rule, Rule):
        return rule
    if not isinstance(rule, str):
        hint = "; call it to make a value" if isinstance(rule, type) and issubclass(rule, Rule) else ""
        raise TypeError(f"`rule`: expected a name or a value of fastens.rules, got {rule!r}{hint}")
    return _DEFAULTS[rule] if rule in _DEFAULTS else _made(class_of(rule))


def _made(cls: type[Rule]) -> Rule:
    if cls is NoiseDependentMean:
        raise ValueError(f"`rule`: {cls.name!r} has no default weights; fit them with fastens.evaluation.fit_weights")
    try:
        return cls()
    except TypeError as error:
        raise ValueError(f"`rule`: {cls.name!r} has parameters without defaults; pass a value: {error}") from error


def class_of(name: str) -> type[Rule]:
    """Return the class of the rules of a name or an alias.

    Raises:
        ValueError: no rule has this name, or the package that has it cannot be imported.
    """
    name = ALIASES.get(name, name)
    if name in REGISTRY:
        return REGISTRY[name]
    offered = importlib.metadata.entry_points(group=ENTRY_POINTS)
    for entry in offered.select(name=name):
        _load(entry)
        return REGISTRY[name]
    known = list(dict.fromkeys([*RULES, *REGISTRY, *offered.names]))
    near = difflib.get_close_matches(name.lower().replace("-", "_"), [*known, *ALIASES], n=3, cutoff=0.5)
    offer = f"did you mean {' or '.join(repr(each) for each in near)}? " if near else ""
    raise ValueError(
        f"`rule`: unknown rule {name!r}; {offer}The rules are {', '.join(known)}; "
        "a rule of your own is known once the module that defines it is imported; on the command line, once an "
        f"installed package names it under the entry points {ENTRY_POINTS!r}"
    )


def _load(entry: importlib.metadata.EntryPoint) -> None:
    where = f"rule {entry.name!r}, which {entry.dist.name if entry.dist else 'a package'} offers as {entry.value},"
    try:
        entry.load()
    except Exception as error:  # whatever the package's import raises
        raise ValueError(f"`rule`: {where} cannot be loaded: {type(error).__name__}: {error}") from error
    if entry.name not in REGISTRY:
        raise ValueError(f"`rule`: {where} is none: no rule of that name is defined there, see fastens.rule")


def from_dict(data: Mapping[str, Any]) -> Rule:
    """Return the rule that :meth:`Rule.to_dict` wrote.

    Raises:
        ValueError: "rule" is missing or unknown, or a parameter is not one of the rule's.
    """
    parameters = dict(data)
    name = parameters.pop("rule", None)
    if not isinstance(name, str):
        raise ValueError(f"expected the rule's name under 'rule', got {dict(data)!r}")
    cls = class_of(name)
    known = {field.name for field in dataclasses.fields(cls)}
    unknown = sorted(set(parameters) - known)
    if unknown:
        raise ValueError(
            f"rule {name!r} has no parameter {', '.join(unknown)}; it has {', '.join(sorted(known)) or 'none'}"
        )
    return cls(**parameters)


def from_schema(name: str, option: str, values: Sequence[float]) -> Rule:
    """Return the rule of a dispatcher call: the inverse of ``name``, ``option`` and ``values``."""
    if name == Mean.name:
        return Mean(tuple(values) or None)
    if name == Median.name:
        return Median(option)
    if name == Geometric.name:
        return Geometric(option, *values)
    return from_dict({"rule": name, **json.loads(option or "{}")})
