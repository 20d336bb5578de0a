"""What each aggregation rule is: its name, its parameters, its randomness (arXiv 2601.11444).

A rule is a value: comparable, hashable, printable, and to and from JSON by :meth:`Rule.to_dict` and :func:`from_dict`.
"""

import difflib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

WEIGHT_SUM_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Rule:
    """How the outputs S_1 ... S_K of the members become one output.

    Attributes:
        name: the rule's name.
        per_evaluation: one member is drawn per sample at every evaluation.
        per_trajectory: one member is drawn per sample and trajectory.
    """

    name: ClassVar[str] = ""
    per_evaluation: ClassVar[bool] = False
    per_trajectory: ClassVar[bool] = False

    def to_dict(self) -> dict[str, Any]:
        """The rule as a JSON-able dictionary."""
        return {"name": self.name, **asdict(self)}


@dataclass(frozen=True)
class Mean(Rule):
    """Σ w_k S_k, w_k = 1/K by default.

    Args:
        weights: K finite numbers that sum to 1 (within 1e-6), or none.
    """

    name: ClassVar[str] = "mean"
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        """Check the weights and keep them as a tuple."""
        if self.weights is None:
            return
        weights = tuple(float(w) for w in self.weights)
        if not all(math.isfinite(w) for w in weights):
            raise ValueError(f"weights {weights} are not all finite")
        if abs(math.fsum(weights) - 1) > WEIGHT_SUM_TOLERANCE:
            raise ValueError(f"weights {weights} sum to {math.fsum(weights):g}, expected 1; divide them by their sum")
        object.__setattr__(self, "weights", weights)


@dataclass(frozen=True)
class Sum(Rule):
    """Σ S_k: the score of a product of experts at t = 0."""

    name: ClassVar[str] = "sum"


@dataclass(frozen=True)
class Median(Rule):
    """The elementwise median.

    Args:
        even: for even K the ``"average"`` of the two middle values, or the ``"lower"`` one.
    """

    name: ClassVar[str] = "median"
    even: str = "average"

    def __post_init__(self) -> None:
        """Check the option."""
        if self.even not in ("average", "lower"):
            raise ValueError(f"even is {self.even!r}, expected 'average' or 'lower'")


@dataclass(frozen=True)
class Geometric(Rule):
    """exp(mean_k log(S_k + m)) - m with m = |min S| + eps, so that every logarithm's argument is positive.

    Args:
        shift: take the minimum over the members and elements of each ``"sample"``, or over the whole ``"batch"``.
        eps: the smallest argument of a logarithm.
    """

    name: ClassVar[str] = "geometric"
    shift: str = "sample"
    eps: float = 1e-6

    def __post_init__(self) -> None:
        """Check the parameters."""
        if self.shift not in ("sample", "batch"):
            raise ValueError(f"shift is {self.shift!r}, expected 'sample' or 'batch'")
        if not (math.isfinite(self.eps) and self.eps > 0):
            raise ValueError(f"eps is {self.eps}, expected a positive number")


@dataclass(frozen=True)
class Dominant(Rule):
    """Elementwise the S_k of largest magnitude, with its sign; ties go to the lowest k."""

    name: ClassVar[str] = "dominant"


@dataclass(frozen=True)
class MaxAbs(Rule):
    """Elementwise max_k |S_k|. The sign is lost; kept for comparison with the paper."""

    name: ClassVar[str] = "max_abs"


@dataclass(frozen=True)
class Alternating(Rule):
    """One member drawn per sample at every evaluation."""

    name: ClassVar[str] = "alternating"
    per_evaluation: ClassVar[bool] = True


@dataclass(frozen=True)
class Mixture(Rule):
    """One member drawn per sample and trajectory."""

    name: ClassVar[str] = "mixture"
    per_trajectory: ClassVar[bool] = True


RULES: dict[str, type[Rule]] = {
    rule.name: rule for rule in (Mean, Sum, Median, Geometric, Dominant, MaxAbs, Alternating, Mixture)
}
ALIASES = {
    "arithmetic": "mean",
    "hinton": "sum",
    "max_arg_values": "dominant",
    "max_values": "max_abs",
    "random_select": "alternating",
    "mixture_of_experts": "mixture",
}


def get(rule: str | Rule) -> Rule:
    """The rule of a name, an alias or a value.

    Raises:
        ValueError: an unknown name; the nearest ones are offered.
        TypeError: neither a name nor a rule.
    """
    if isinstance(rule, Rule):
        return rule
    if not isinstance(rule, str):
        raise TypeError(f"rule is a {type(rule).__name__}, expected a name or a value of fastens.rules")
    found = RULES.get(ALIASES.get(rule, rule))
    if found is None:
        names = [*RULES, *ALIASES]
        near = difflib.get_close_matches(rule, names)
        offer = f"did you mean {' or '.join(map(repr, near))}?" if near else f"expected one of {', '.join(names)}"
        raise ValueError(f"rule {rule!r} is unknown; {offer}")
    return found()


def from_dict(data: dict[str, Any]) -> Rule:
    """The rule that :meth:`Rule.to_dict` described."""
    parameters = {key: value for key, value in data.items() if key != "name"}
    rule_class = type(get(data["name"]))
    return rule_class(**parameters)
