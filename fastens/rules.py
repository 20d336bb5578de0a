"""Aggregation rules as values: what each rule is called, its parameters, and the randomness it needs.

A rule says how the scores of K members become one score (arXiv 2601.11444, section on aggregation). Rules compare
and hash by value, print as the expression that makes them, and pass through JSON:
``from_dict(rule.to_dict()) == rule``.
The arithmetic is in :func:`fastens.aggregate`.
"""

from __future__ import annotations

import bisect
import dataclasses
import difflib
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

WEIGHT_SUM_TOLERANCE = 1e-6


def _check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}`: expected {' or '.join(repr(choice) for choice in choices)}, got {value!r}")


def _checked_weights(weights: Sequence[float]) -> tuple[float, ...]:
    try:
        values = tuple(float(weight) for weight in weights)
    except (TypeError, ValueError):
        raise TypeError(f"`weights`: expected a sequence of numbers, one per member, got {weights!r}") from None
    if not values:
        raise ValueError("`weights`: expected one weight per member, got none")
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"`weights`: expected finite numbers, got {values}")
    total = math.fsum(values)
    if abs(total - 1.0) > WEIGHT_SUM_TOLERANCE:
        raise ValueError(
            f"`weights`: expected a sum of 1 within {WEIGHT_SUM_TOLERANCE}, got {total!r}; "
            "divide each weight by the sum"
        )
    return values


@dataclasses.dataclass(frozen=True)
class Rule:
    """Base of the rules: no parameters, no randomness.

    Attributes:
        name: the rule's name, as :func:`get` takes it.
        per_evaluation: one member is drawn per sample at every evaluation, and only the drawn members need to run.
        per_trajectory: one member is drawn per sample for a whole trajectory, so the rule needs an ensemble.
        needs_noise_level: the rule depends on how noisy a sample is, so it needs an ensemble that has a schedule.
    """

    name: ClassVar[str]
    per_evaluation: ClassVar[bool] = False
    per_trajectory: ClassVar[bool] = False
    needs_noise_level: ClassVar[bool] = False

    @property
    def random(self) -> bool:
        """Whether each sample is sent to one drawn member instead of to all."""
        return self.per_evaluation or self.per_trajectory

    @property
    def option(self) -> str:
        """The rule's choice, as the dispatcher's schema takes it; empty where it has none."""
        return ""

    @property
    def values(self) -> tuple[float, ...]:
        """The rule's numbers, as the dispatcher's schema takes them."""
        return ()

    def check(self, num_members: int) -> None:
        """Raise ValueError where the rule does not fit ``num_members`` members."""

    def to_dict(self) -> dict[str, Any]:
        """Return the rule as JSON-able values: its name under "rule", beside its parameters."""
        return {"rule": self.name, **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True)
class Mean(Rule):
    """Weighted arithmetic mean, ``sum_k w_k S_k``; ``w_k = 1/K`` by default.

    Args:
        weights: K finite numbers that sum to 1 within 1e-6; kept as a tuple of floats.

    Raises:
        TypeError: ``weights`` is not a sequence of numbers.
        ValueError: ``weights`` is empty, not finite, or does not sum to 1.
    """

    name: ClassVar[str] = "mean"
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        """Check the weights and keep them as a tuple, so that the value hashes."""
        if self.weights is None:
            return
        object.__setattr__(self, "weights", _checked_weights(self.weights))

    @property
    def values(self) -> tuple[float, ...]:
        """The weights, empty for equal ones."""
        return self.weights or ()

    def check(self, num_members: int) -> None:
        """Raise ValueError where there are weights but not one per member."""
        if self.weights is not None and len(self.weights) != num_members:
            raise ValueError(
                f"`weights`: expected one weight per member, {num_members}, got {len(self.weights)} weights; "
                "pass as many weights as members"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the rule as JSON-able values."""
        return {"rule": self.name, "weights": None if self.weights is None else list(self.weights)}


@dataclasses.dataclass(frozen=True)
class NoiseDependentMean(Mean):
    """Weighted mean whose weights depend on the noise level, interpolated linearly in ``log(alpha^2 / sigma^2)``.

    It is a rule of an ensemble that has a schedule, by which the time among its arguments becomes a noise level; beyond
    the levels the nearest one's weights hold. :func:`fastens.evaluation.fit_weights` makes it.

    Args:
        weights: of the members at each level, L tuples of K finite numbers that sum to 1 within 1e-6.
        log_snr: of the levels, L rising numbers.

    Raises:
        TypeError: not numbers.
        ValueError: no levels, other numbers of weights and levels, levels that do not rise, or weights as for a mean.
    """

    name: ClassVar[str] = "noise_dependent_mean"
    needs_noise_level: ClassVar[bool] = True
    weights: tuple[tuple[float, ...], ...] = ()  # pyright: ignore[reportIncompatibleVariableOverride]
    log_snr: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Check weights and levels and keep them as tuples, so that the value hashes."""
        rows = tuple(_checked_weights(row) for row in self.weights)
        levels = tuple(float(level) for level in self.log_snr)
        if not rows or len(rows) != len(levels) or len({len(row) for row in rows}) != 1:
            raise ValueError(
                f"`weights`: expected one tuple of K weights per level, got {len(rows)} of "
                f"{sorted({len(row) for row in rows})} weights for {len(levels)} levels"
            )
        if not all(map(math.isfinite, levels)) or any(b <= a for a, b in itertools.pairwise(levels)):
            raise ValueError(f"`log_snr`: expected rising finite numbers, got {levels}")
        object.__setattr__(self, "weights", rows)
        object.__setattr__(self, "log_snr", levels)

    def at(self, log_snr: float) -> Mean:
        """The mean at one noise level."""
        right = min(max(bisect.bisect_right(self.log_snr, log_snr), 1), len(self.log_snr) - 1)
        left = max(right - 1, 0)
        span = self.log_snr[right] - self.log_snr[left]
        share = min(max((log_snr - self.log_snr[left]) / span, 0.0), 1.0) if span else 0.0
        pairs = zip(self.weights[left], self.weights[right], strict=True)
        return Mean(tuple(a + share * (b - a) for a, b in pairs))

    @property
    def values(self) -> tuple[float, ...]:
        """None: the weights are not known before the noise level is."""
        return ()

    def check(self, num_members: int) -> None:
        """Raise ValueError where there is not one weight per member."""
        Mean(self.weights[0]).check(num_members)

    def to_dict(self) -> dict[str, Any]:
        """Return the rule as JSON-able values."""
        return {"rule": self.name, "weights": [list(row) for row in self.weights], "log_snr": list(self.log_snr)}


@dataclasses.dataclass(frozen=True)
class Sum(Rule):
    """Sum, ``sum_k S_k``: the score of a product of experts at t = 0.

    Changes the norm of the score, and with it the step size of a Langevin corrector, which is set by that norm.
    """

    name: ClassVar[str] = "sum"


@dataclasses.dataclass(frozen=True)
class Median(Rule):
    """Elementwise median.

    Args:
        even: for even K, "average" of the two middle values or the "lower" of them.

    Raises:
        ValueError: another value of ``even``.
    """

    name: ClassVar[str] = "median"
    even: str = "average"

    def __post_init__(self) -> None:
        """Check ``even``."""
        _check_choice("even", self.even, ("average", "lower"))

    @property
    def option(self) -> str:
        """``even``."""
        return self.even


@dataclasses.dataclass(frozen=True)
class Geometric(Rule):
    """Shifted geometric mean, ``exp(mean_k log(S_k + m)) - m`` with ``m = |min S| + eps``.

    Args:
        shift: the minimum is over the members and elements of one "sample", or over the whole "batch" as in the
            paper's code, where results depend on batch-mates.
        eps: added to the shift, so that every logarithm has a positive argument; at least 1e-30, to stay a normal
            number in float32.

    Raises:
        ValueError: another value of ``shift``; ``eps`` not finite or too small.
    """

    name: ClassVar[str] = "geometric"
    shift: str = "sample"
    eps: float = 1e-6

    def __post_init__(self) -> None:
        """Check ``shift`` and ``eps``."""
        _check_choice("shift", self.shift, ("sample", "batch"))
        if not (math.isfinite(self.eps) and self.eps >= 1e-30):
            raise ValueError(f"`eps`: expected a finite number of at least 1e-30, got {self.eps!r}")

    @property
    def option(self) -> str:
        """``shift``."""
        return self.shift

    @property
    def values(self) -> tuple[float, ...]:
        """``eps``."""
        return (self.eps,)


@dataclasses.dataclass(frozen=True)
class Dominant(Rule):
    """Elementwise the signed ``S_k`` of largest ``|S_k|``; ties go to the lowest k.

    Changes the norm of the score, and with it the step size of a Langevin corrector, which is set by that norm.
    """

    name: ClassVar[str] = "dominant"


@dataclasses.dataclass(frozen=True)
class MaxAbs(Rule):
    """Elementwise ``max_k |S_k|``: the sign is lost; kept for comparison with the paper.

    Changes the norm of the score, and with it the step size of a Langevin corrector, which is set by that norm.
    """

    name: ClassVar[str] = "max_abs"


@dataclasses.dataclass(frozen=True)
class Alternating(Rule):
    """One member, drawn per sample at every evaluation."""

    name: ClassVar[str] = "alternating"
    per_evaluation: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True)
class Mixture(Rule):
    """One member, drawn per sample for a whole trajectory."""

    name: ClassVar[str] = "mixture"
    per_trajectory: ClassVar[bool] = True


RULES: Mapping[str, type[Rule]] = {
    cls.name: cls for cls in (Mean, Sum, Median, Geometric, Dominant, MaxAbs, Alternating, Mixture)
}

# The names in the code of arXiv 2601.11444 (rarazafin/score_diffusion_ensemble).
ALIASES: Mapping[str, str] = {
    "arithmetic": "mean",
    "hinton": "sum",
    "max_arg_values": "dominant",
    "max_values": "max_abs",
    "random_select": "alternating",
    "mixture_of_experts": "mixture",
}

_DEFAULTS: Mapping[str, Rule] = {
    **{name: cls() for name, cls in RULES.items()},
    **{alias: RULES[name]() for alias, name in ALIASES.items()},
}


def names() -> tuple[str, ...]:
    """Return the names of the rules, without aliases."""
    return tuple(RULES)


def get(rule: str | Rule) -> Rule:
    """Return the rule that a name or an alias stands for, with default parameters; a rule is returned as it is.

    Raises:
        ValueError: no rule has this name (the nearest names are offered).
        TypeError: ``rule`` is neither a name nor a rule.
    """
    if isinstance(rule, Rule):
        return rule
    if not isinstance(rule, str):
        hint = "; call it to make a value" if isinstance(rule, type) and issubclass(rule, Rule) else ""
        raise TypeError(f"`rule`: expected a name or a value of fastens.rules, got {rule!r}{hint}")
    if rule == NoiseDependentMean.name:
        raise ValueError(f"`rule`: {rule!r} has no default weights; fit them with fastens.evaluation.fit_weights")
    if rule not in _DEFAULTS:
        near = difflib.get_close_matches(rule.lower().replace("-", "_"), list(_DEFAULTS), n=3, cutoff=0.5)
        offer = f"did you mean {' or '.join(repr(name) for name in near)}? " if near else ""
        raise ValueError(f"`rule`: unknown rule {rule!r}; {offer}The rules are {', '.join(RULES)}")
    return _DEFAULTS[rule]


def from_dict(data: Mapping[str, Any]) -> Rule:
    """Return the rule that :meth:`Rule.to_dict` wrote.

    Raises:
        ValueError: "rule" is missing or unknown, or a parameter is not one of the rule's.
    """
    parameters = dict(data)
    name = parameters.pop("rule", None)
    if not isinstance(name, str):
        raise ValueError(f"expected the rule's name under 'rule', got {dict(data)!r}")
    cls = NoiseDependentMean if name == NoiseDependentMean.name else type(get(name))
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
    return get(name)
