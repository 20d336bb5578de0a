"""What the package's own modules ask of an ensemble, beside what its users may.

An ensemble answers for its members: ``ens.sigma_min`` is the member's where the ensemble has no attribute of that name.
So what only this package needs is asked for by functions, which hide no attribute of a member.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from fastens.network.stacking import AS_THEY_ARE

if TYPE_CHECKING:
    from fastens import rules, schedules
    from fastens.draws import Assignment, Draws
    from fastens.engine.arguments import Arguments
    from fastens.engine.engine import Engine
    from fastens.ensemble import Ensemble
    from fastens.network.modules_apart import ModulesApart
    from fastens.network.stacking import Stacked
    from fastens.views import Views

Args = tuple[Any, ...]
Kwargs = dict[str, Any]

# What it consists of


def engine_of(module: nn.Module) -> Engine | None:
    """The engine of members of one structure; none where members are looped as the modules that they are.

    None of a module that is no ensemble, too.
    """
    return module.__dict__.get("_engine")


def why_looped(ensemble: Ensemble) -> str:
    """Why members are looped as the modules that they are, where :func:`engine_of` is none."""
    return ensemble.__dict__["_why_loop"]


def settings_of(ensemble: Ensemble) -> dict[str, Any]:
    """What it was made with, as :func:`fastens.settings.check_settings` gives it; of MC Dropout also its masks."""
    return ensemble._settings


def prediction_of(ensemble: Ensemble) -> schedules.Prediction:
    """What the members' outputs mean, as far as it was said."""
    return ensemble._prediction


def draws_of(ensemble: Ensemble) -> Draws:
    """Its random state, which knows the trajectory and the assignment in this context."""
    return ensemble._draws


def views_of(ensemble: Ensemble) -> Views:
    """It and its views under other rules."""
    return ensemble._views


def base_of(ensemble: Ensemble) -> type[Ensemble]:
    """Its class before a framework's own base class was added."""
    return ensemble._kind()


def is_fresh(ensemble: Ensemble) -> bool:
    """Whether every evaluation draws numbers of its own, as fresh masks are."""
    return ensemble._fresh


# Evaluation


def arguments_of(ensemble: Ensemble, args: Args, kwargs: Kwargs) -> Arguments:
    """The arguments of a call, which begins an evaluation where each draws numbers of its own."""
    return ensemble._arguments(args, kwargs)


def outputs_of(ensemble: Ensemble, args: Args, kwargs: Kwargs) -> list[Any]:
    """The leaves of the members' outputs, each [K, B, ...] or a list of K, and how they are nested last."""
    return ensemble._evaluate(args, kwargs)


def output_of_member(ensemble: Ensemble, k: int, arguments: Arguments, method: str = "forward") -> Any:
    """What member k returns, where members are looped as the modules that they are."""
    return ensemble._call_module(k, arguments, method)


def modules_apart(ensemble: Ensemble) -> ModulesApart:
    """The members, where they are looped as the modules that they are."""
    return cast("ModulesApart", ensemble.network)


def output_by_rows(ensemble: Ensemble, assigned: Assignment, args: Args, kwargs: Kwargs) -> Any:
    """What a member returns, each row by the member that it is assigned to."""
    return ensemble._evaluated_by(assigned, args, kwargs)


def aggregation_of(ensemble: Ensemble, args: Args, kwargs: Kwargs) -> Callable[[Any], Tensor]:
    """What makes one score [B, ...] of the members' scores [K, B, ...] in this call."""
    return ensemble._aggregation(args, kwargs)


def combine(ensemble: Ensemble, outputs: list[Any], how: Callable[[Any], Any]) -> Any:
    """What a member returns, given :func:`outputs_of` and what makes one tensor of those of K members."""
    return ensemble._combine(outputs, how)


# Making one, and changing it


def begin(ensemble: Ensemble, num_members: int, rule: str | rules.Rule, settings: Mapping[str, Any]) -> None:
    """Make an ensemble without members of a module that has been initialised."""
    ensemble._setup(num_members, rule, dict(settings))


def hold_stacks(ensemble: Ensemble, stacked: Stacked) -> None:
    """Give it members of one structure."""
    ensemble._adopt(stacked)


def hold_modules(ensemble: Ensemble, modules: Sequence[nn.Module], why: str) -> None:
    """Give it members that are looped as the modules that they are, and why they are."""
    ensemble._hold(modules, why)


def take(ensemble: Ensemble, members: Sequence[nn.Module], into: Mapping[str, Tensor]) -> None:
    """Make it, and its views, the ensemble of what copies of its members became, in stacks that there are by name."""
    engine = engine_of(ensemble)
    ensemble._take(members, AS_THEY_ARE, into, () if engine is None else engine.overlapping)


def forget(ensemble: Ensemble) -> None:
    """Let it forget what was derived from the weights."""
    ensemble._forget()
