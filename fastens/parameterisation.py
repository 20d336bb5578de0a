"""What a network predicts, and conversions between the ways to say it: the only place for them.

On a Gaussian path ``x = alpha x_0 + sigma eps`` every prediction is a combination ``a x_0 + b eps``:

| prediction | a | b |
|---|---|---|
| ``epsilon`` | 0 | 1 |
| ``x0`` | 1 | 0 |
| ``v`` (Salimans and Ho, arXiv 2202.00512) | -sigma | alpha |
| ``score`` | 0 | -1 / sigma |
| ``flow`` (velocity, arXiv 2210.02747) | alpha' | sigma' |

Two of them and x determine each other linearly, so a mean over members commutes with every conversion; geometric means,
medians of even K, sums and maxima do not.
"""

import inspect
from typing import Any

import torch
from torch import Tensor

from fastens import schedules
from fastens.fold.arguments import Arguments

PREDICTIONS = ("epsilon", "x0", "v", "score", "flow")
_OF_SCHEDULER = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v", "flow_prediction": "flow"}
# What the networks of the sampler families call their time.
_TIMES = ("timestep", "timesteps", "t", "time", "sigma", "sigmas", "noise_labels", "time_cond", "labels")


def _combination(prediction: str, schedule: schedules.Schedule, t: Any) -> tuple[Tensor, Tensor]:
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
    if prediction == "epsilon":
        return zero, one
    if prediction == "x0":
        return one, zero
    if prediction == "v":
        return -sigma, alpha
    if prediction == "score":
        return zero, -1 / sigma
    return schedule.alpha_rate(t), schedule.sigma_rate(t)


def conversion(source: str, target: str, schedule: schedules.Schedule, t: Any) -> tuple[Tensor, Tensor]:
    """Return a and b with ``target = a x + b source`` at a time.

    Args:
        source: one of PREDICTIONS.
        target: likewise.
        schedule: alpha and sigma of the path.
        t: time of the schedule, a number or a tensor [] or [B].

    Returns:
        Each float64, shaped as the time; infinite or NaN where the schedule has no answer (alpha = 0, ...).

    Raises:
        ValueError: an unknown parameterisation.
    """
    for name in (source, target):
        check_prediction("prediction", name)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    if source == target:
        return torch.zeros_like(alpha), torch.ones_like(alpha)
    a, b = _combination(source, schedule, t)
    c, d = _combination(target, schedule, t)
    if {source, target} == {"epsilon", "score"}:  # the one is the other scaled, wherever there is noise
        return torch.zeros_like(alpha), d / b
    determinant = a * sigma - b * alpha
    return (a * d - b * c) / determinant, (c * sigma - d * alpha) / determinant


def convert(value: Tensor, x: Tensor, t: Any, schedule: schedules.Schedule, source: str, target: str) -> Tensor:
    """Say a prediction in another parameterisation.

    Args:
        value: [..., B, *shape], predictions for ``x``; leading dimensions such as members are kept.
        x: [B, *shape], the noisy input as the path has it.
        t: time of the schedule, a number or a tensor [] or [B].
        schedule: alpha and sigma of the path.
        source: one of PREDICTIONS.
        target: likewise.

    Returns:
        [..., B, *shape], of the dtype of ``value``; infinite or NaN where the schedule has no answer (alpha = 0, ...).

    Raises:
        ValueError: an unknown parameterisation.
    """
    if source == target:
        check_prediction("prediction", source)
        return value
    of_x, of_value = conversion(source, target, schedule, t)
    return (value * schedules.per_sample(of_value, x) + x * schedules.per_sample(of_x, x)).to(value.dtype)


def check_prediction(what: str, name: str) -> None:
    """Raise ValueError unless ``name`` is one of PREDICTIONS."""
    if name not in PREDICTIONS:
        raise ValueError(f"{what} {name!r} is unknown, expected one of {', '.join(PREDICTIONS)}")


def resolve(prediction: str | None, aggregate_in: str | None, schedule: Any) -> tuple[str | None, str | None, Any]:
    """Check what an ensemble was told of its parameterisation.

    Args:
        prediction: what the members predict; none to take it from a diffusers scheduler, if there is one.
        aggregate_in: what the rule is applied to; none for ``prediction``.
        schedule: a :class:`fastens.schedules.Schedule`, or a diffusers scheduler.

    Returns:
        prediction, aggregate_in and a schedule of :mod:`fastens.schedules` or none.

    Raises:
        ValueError: an unknown parameterisation, a scheduler that contradicts ``prediction``, or a conversion without
            prediction or schedule.
        TypeError: ``schedule`` is neither.
    """
    for name, value in (("prediction", prediction), ("aggregate_in", aggregate_in)):
        if value is not None:
            check_prediction(name, value)
    if schedule is not None and not isinstance(schedule, schedules.Schedule):
        if not hasattr(schedule, "config"):
            raise TypeError(
                f"schedule is a {type(schedule).__name__}, expected one of fastens.schedules or a diffusers scheduler"
            )
        kind = schedule.config.get("prediction_type")
        theirs = _OF_SCHEDULER.get(kind)
        if prediction is not None and theirs is not None and theirs != prediction:
            raise ValueError(
                f"prediction={prediction!r}, but the scheduler's prediction_type is {kind!r}; one of them is wrong, "
                "and samples would be too"
            )
        prediction = prediction or theirs
        schedule = schedules.from_scheduler(schedule)
    if aggregate_in is not None and aggregate_in != prediction:
        if prediction is None:
            raise ValueError(f"aggregate_in={aggregate_in!r} needs prediction=, what the members predict")
        if schedule is None:
            raise ValueError(
                f"aggregate_in={aggregate_in!r} with prediction={prediction!r} needs schedule=, the noise schedule "
                "that the members were trained with: one of fastens.schedules, or the diffusers scheduler"
            )
    return prediction, aggregate_in, schedule


def time_of(forward: Any, arguments: Arguments, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The time among a network's arguments: by its name, else the first number or tensor that is not the batch.

    Raises:
        ValueError: there is none.
    """
    bound = inspect.signature(forward).bind_partial(*args, **kwargs).arguments
    for name in _TIMES:
        if bound.get(name) is not None and bound[name] is not arguments.batch:
            return bound[name]
    for leaf in arguments.leaves:
        if leaf is not arguments.batch and isinstance(leaf, int | float | Tensor) and not isinstance(leaf, bool):
            return leaf
    raise ValueError(
        f"found no time among the arguments ({', '.join(bound)}), and the rule needs the noise level; "
        f"expected one of {', '.join(_TIMES)}"
    )


def predicts_variances(x: Tensor, scores: Tensor) -> bool:
    """Whether ``scores`` [K, B, 2C, ...] hold variances behind the C channels of ``x`` [B, C, ...]."""
    return (
        scores.ndim == x.ndim + 1
        and x.ndim > 2
        and scores.shape[2] == 2 * x.shape[1]
        and scores.shape[3:] == x.shape[2:]
    )
