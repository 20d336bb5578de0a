"""What every rule has: a name, parameters that JSON keeps, and a definition in torch."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

REGISTRY: dict[str, type[Rule]] = {}  # the rules by name, those of users too
ALIASES: dict[str, str] = {  # the names in the code of arXiv 2601.11444 (rarazafin/score_diffusion_ensemble)
    "arithmetic": "mean",
    "hinton": "sum",
    "max_arg_values": "dominant",
    "max_values": "max_abs",
    "random_select": "alternating",
    "mixture_of_experts": "mixture",
}


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise ValueError unless a parameter is one of its choices."""
    if value not in choices:
        raise ValueError(f"`{name}`: expected {' or '.join(repr(choice) for choice in choices)}, got {value!r}")


@dataclasses.dataclass(frozen=True)
class Rule:
    """Base of the rules: how the scores of K members become one score.

    A rule of one's own is a function under :func:`fastens.rule`, or a frozen dataclass that derives from this class,
    with a ``name``, its parameters as fields, and :meth:`combine`.

    Attributes:
        name: the rule's name, as :func:`fastens.rules.get` takes it.
        has_kernels: the compiled libraries and Triton know the rule by its name, ``option`` and ``values``.
        linear: the rule is a weighted mean, which commutes with changes of parameterisation.
        per_evaluation: one member is drawn per sample at every evaluation, and only the drawn members need to run.
        per_trajectory: one member is drawn per sample for a whole trajectory, so the rule needs an ensemble.
        needs_noise_level: the rule depends on how noisy a sample is, so it needs an ensemble that has a schedule.
        of_scores: the rule is of scores or noises, and not of data or velocities: an ensemble of those converts.

    Raises:
        TypeError: a parameter that JSON does not keep; a class with a definition of its own but without a name.
        ValueError: a number that is not finite; a name that another rule has.
    """

    name: ClassVar[str]
    has_kernels: ClassVar[bool] = False
    linear: ClassVar[bool] = False
    per_evaluation: ClassVar[bool] = False
    per_trajectory: ClassVar[bool] = False
    needs_noise_level: ClassVar[bool] = False
    of_scores: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        """Make the rule known by its name. What is said of a parent's definition does not hold for another one."""
        super().__init_subclass__(**options)
        own = vars(cls)
        if "combine" in own and "name" not in own:
            raise TypeError(
                f"{cls.__qualname__} has a definition of its own; give it a name of its own: "
                f"name = {cls.__qualname__.lower()!r}"
            )
        if "name" in own:
            cls.has_kernels = own.get("has_kernels", False)
        if "combine" in own:
            cls.linear = own.get("linear", False)
        if "name" in own:
            _register(cls)

    def __post_init__(self) -> None:
        """Keep the parameters as JSON does: lists as tuples, so that the value hashes."""
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _kept(field.name, getattr(self, field.name)))

    @property
    def random(self) -> bool:
        """Whether each sample is sent to one drawn member instead of to all."""
        return self.per_evaluation or self.per_trajectory

    def combine(self, scores: Tensor) -> Tensor:
        """The rule's definition, in torch operations.

        Args:
            scores: [K, B, ...], float32 or float64.

        Returns:
            [B, ...], of the scores' dtype.
        """
        what = "draws members, and combines none" if self.random else "has no definition: override combine(scores)"
        raise NotImplementedError(f"rule {self!r} {what}")

    @property
    def option(self) -> str:
        """Return what kernels take beside the rule's name; for a rule without kernels, its parameters as JSON."""
        return json.dumps(dataclasses.asdict(self)) if dataclasses.fields(self) else ""

    @property
    def values(self) -> tuple[float, ...]:
        """The rule's numbers, as kernels take them."""
        return ()

    def check(self, num_members: int) -> None:
        """Raise ValueError where the rule does not fit ``num_members`` members."""

    def used(self, members: list[Tensor]) -> tuple[list[Tensor], Rule]:
        """The scores [B, ...] of the members that the rule uses, and the rule of these alone."""
        return members, self

    def to_dict(self) -> dict[str, Any]:
        """Return the rule as JSON-able values: its name under "rule", beside its parameters."""
        return {"rule": self.name, **dataclasses.asdict(self)}


def _register(cls: type[Rule]) -> None:
    if not isinstance(cls.name, str) or not cls.name.isidentifier():
        raise ValueError(
            f"a rule's name is {cls.name!r}, expected letters, digits and underscores, as in 'trimmed_mean'"
        )
    other = REGISTRY.get(ALIASES.get(cls.name, cls.name))
    # The same class once more is a cell of a notebook that was run again, or a module that was reloaded.
    if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(
            f"rule {cls.name!r} of {cls.__module__}.{cls.__qualname__} has the name of "
            f"{other.__module__}.{other.__qualname__}; choose another"
        )
    REGISTRY[cls.name] = cls


def _kept(name: str, value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_kept(name, each) for each in value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"`{name}`: {value!r} has no form in JSON, expected a finite number")
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value)  # also NumPy's
    raise TypeError(
        f"`{name}`: a {type(value).__name__} has no form in JSON; a rule's parameters are numbers, strings, booleans, "
        "None, and tuples of them"
    )
