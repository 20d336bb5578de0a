"""What a network predicts, and conversions between the ways to say it: the only place for them.

On a Gaussian path ``x = alpha x_0 + sigma eps`` every prediction is a combination ``a x_0 + b eps``:

| prediction | a | b |
|---|---|---|
| ``epsilon`` | 0 | 1 |
| ``x0`` | 1 | 0 |
| ``v`` (Salimans and Ho, arXiv 2202.00512) | -sigma | alpha |
| ``score`` | 0 | -1 / sigma |
| ``flow`` (velocity, arXiv 2210.02747) | alpha' | sigma' |
| ``edm`` (Karras et al., arXiv 2206.00364) | s / (d r) | -d / r |
| ``edm_v``, its negative | -s / (d r) | d / r |

with ``s = sigma / alpha``, ``d = sigma_data`` and ``r = sqrt(s^2 + d^2)``. Two of them and x determine each other
linearly, so a mean over members commutes with every conversion; geometric means, medians of even K, sums and maxima do
not. :class:`fastens.schedules.Prediction` says which a network gives, of what input.
"""

import inspect
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fastens import schedules
from fastens.engine.arguments import Arguments
from fastens.schedules.prediction import PRECONDITIONED, PREDICTIONS, Prediction, check_kind
from fastens.schedules.schedulers import described, prediction_of

# What the networks of the sampler families call their time.
_TIMES = ("timestep", "timesteps", "t", "time", "sigma", "sigmas", "noise_labels", "time_cond")


def combination(
    prediction: str, schedule: schedules.Schedule, t: Any, sigma_data: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return a and b of a prediction ``a x_0 + b eps`` at a time of the schedule, each float64, shaped as the time."""
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
    if prediction in PRECONDITIONED:
        if sigma_data is None:
            raise ValueError(f"prediction {prediction!r} needs sigma_data=, the standard deviation of the data")
        sign = 1 if prediction == "edm" else -1
        root = (sigma.square() + (alpha * sigma_data).square()).sqrt()  # alpha r
        return sign * sigma / (sigma_data * root), -sign * sigma_data * alpha / root
    return schedule.alpha_rate(t), schedule.sigma_rate(t)


def conversion(
    source: str, target: str, schedule: schedules.Schedule, t: Any, sigma_data: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return a and b with ``target = a x + b source`` at a time.

    Args:
        source: one of PREDICTIONS or PRECONDITIONED.
        target: likewise.
        schedule: alpha and sigma of the path.
        t: time of the schedule, a number or a tensor [] or [B].
        sigma_data: standard deviation of the data, of those in PRECONDITIONED.

    Returns:
        Each float64, shaped as the time; infinite or NaN where the schedule has no answer (alpha = 0, ...).

    Raises:
        ValueError: an unknown parameterisation, or one of PRECONDITIONED without sigma_data.
    """
    for name in (source, target):
        check_kind("prediction", name)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    if source == target:
        return torch.zeros_like(alpha), torch.ones_like(alpha)
    a, b = combination(source, schedule, t, sigma_data)
    c, d = combination(target, schedule, t, sigma_data)
    if {source, target} == {"epsilon", "score"}:  # the one is the other scaled, wherever there is noise
        return torch.zeros_like(alpha), d / b
    determinant = a * sigma - b * alpha
    return (a * d - b * c) / determinant, (c * sigma - d * alpha) / determinant


def convert(
    value: Tensor,
    x: Tensor,
    t: Any,
    schedule: schedules.Schedule,
    source: str,
    target: str,
    sigma_data: float | None = None,
) -> Tensor:
    """Say a prediction in another parameterisation.

    Args:
        value: [..., B, *shape], predictions for ``x``; leading dimensions such as members are kept.
        x: [B, *shape], the noisy input as the path has it.
        t: time of the schedule, a number or a tensor [] or [B].
        schedule: alpha and sigma of the path.
        source: one of PREDICTIONS or PRECONDITIONED.
        target: likewise.
        sigma_data: standard deviation of the data, of those in PRECONDITIONED.

    Returns:
        [..., B, *shape], of the dtype of ``value``; infinite or NaN where the schedule has no answer (alpha = 0, ...).

    Raises:
        ValueError: an unknown parameterisation, or one of PRECONDITIONED without sigma_data.
    """
    if source == target:
        check_kind("prediction", source)
        return value
    of_x, of_value = conversion(source, target, schedule, t, sigma_data)
    return (value * schedules.per_sample(of_value, x) + x * schedules.per_sample(of_x, x)).to(value.dtype)


def input_factor(prediction: Prediction, t: Any) -> Tensor | None:
    """Return the factor from the path's x to the network's input at a time, None for 1."""
    if prediction.input_scaling != "unit_variance":
        return None
    schedule, deviation = prediction.schedule, prediction.sigma_data
    assert schedule is not None
    assert deviation is not None
    return ((deviation * schedule.alpha(t)).square() + schedule.sigma(t).square()).rsqrt()


def resolve(
    prediction: str | Prediction | None, aggregate_in: str | None, schedule: Any
) -> tuple[Prediction, str | None, schedules.Schedule | None]:
    """Bring together what an ensemble was told of its members' outputs.

    Args:
        prediction: what the members predict: a kind, or all of it; none to take it from a diffusers scheduler.
        aggregate_in: what the rule is applied to; none for what the members predict.
        schedule: a :class:`fastens.schedules.Schedule`, or a diffusers scheduler.

    Returns:
        The prediction with all that was said, aggregate_in, and the prediction's schedule.

    Raises:
        ValueError: an unknown parameterisation, two sources that contradict each other, a scheduler that is refused, or
            a conversion without prediction or schedule.
        TypeError: ``schedule`` is neither, or ``prediction`` is no name and no Prediction.
    """
    if not isinstance(prediction, str | Prediction | None):
        raise TypeError(f"prediction is a {type(prediction).__name__}, expected a name or a Prediction")
    given = prediction if isinstance(prediction, Prediction) else Prediction(prediction)
    found = given.with_(read(schedule), "prediction=", source_of(schedule))
    if aggregate_in is not None and aggregate_in != found.kind:
        check_kind("aggregate_in", aggregate_in, PREDICTIONS)
        if found.kind is None:
            raise ValueError(f"aggregate_in={aggregate_in!r} needs prediction=, what the members predict")
        if found.schedule is None:
            raise ValueError(
                f"aggregate_in={aggregate_in!r} with prediction={found.kind!r} needs schedule=, the noise schedule "
                "that the members were trained with: one of fastens.schedules, or the diffusers scheduler"
            )
        found.check_said()
    return found, aggregate_in, found.schedule


def source_of(schedule: Any) -> str:
    """A schedule or scheduler as messages name it."""
    return f"schedule={read(schedule).source or ''}" if _plain(schedule) else described(schedule)


def _plain(schedule: Any) -> bool:
    return schedule is None or isinstance(schedule, schedules.Schedule)


def read(schedule: Any) -> Prediction:
    """What a schedule, or a diffusers scheduler, says; none says nothing.

    Raises:
        ValueError: a scheduler that is refused.
        TypeError: it is neither.
    """
    if _plain(schedule):
        return getattr(schedule, "said", None) or Prediction(schedule=schedule)
    if not hasattr(schedule, "config"):
        raise TypeError(
            f"schedule is a {type(schedule).__name__}, expected one of fastens.schedules, or a diffusers scheduler as "
            "fastens.schedules.from_scheduler takes it"
        )
    return prediction_of(schedule)


def time_of(forward: Any, arguments: Arguments, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The time among a network's arguments: by its name, else the first number or tensor that is not the batch.

    What is called ``labels`` is the time of score_sde's networks, which take it second, else it is classes.

    Raises:
        ValueError: there is none.
    """
    bound = inspect.signature(forward).bind_partial(*args, **kwargs).arguments
    for name in _TIMES:
        if bound.get(name) is not None and bound[name] is not arguments.batch:
            return bound[name]
    for leaf in pytree.tree_leaves((list(bound.values()), arguments.leaves)):
        if leaf is not arguments.batch and isinstance(leaf, int | float | Tensor) and not isinstance(leaf, bool):
            return leaf
    raise ValueError(
        f"found no time among the arguments ({', '.join(bound)}), and the rule needs the noise level; "
        f"expected one of {', '.join(_TIMES)}"
    )


def noisy_input(forward: Any, arguments: Arguments, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The network's first tensor of at least two dimensions in the order of its signature, [B, ...]."""
    if args and isinstance(args[0], Tensor) and args[0].ndim > 1:
        return args[0]
    bound = inspect.signature(forward).bind_partial(*args, **kwargs).arguments
    tensors = (value for value in bound.values() if isinstance(value, Tensor) and value.ndim > 1)
    return next(tensors, arguments.batch)


def predicted_channels(prediction: Prediction, x: Tensor, shape: torch.Size) -> int:
    """Return how many of an output's leading channels are the prediction; the rest are variances.

    Args:
        prediction: what is said of the network.
        x: its input, [B, C, ...].
        shape: of the output of one member, [B, C', ...].

    Raises:
        ValueError: variances were said, and the output is not twice the noisy channels, else of the input's shape.
    """
    full = shape[1] if len(shape) > 1 else 1
    if prediction.variances is False or (prediction.variances is None and len(shape) < 2):
        return full
    alike = x.ndim == len(shape) > 1 and shape[2:] == x.shape[2:]
    noisy = prediction.noisy_channels
    if prediction.variances is None:
        start, stop = noisy or (0, x.shape[1] if x.ndim > 1 else 0)
        return full // 2 if alike and full == 2 * (stop - start) else full
    if not alike or full % 2 or (noisy is not None and full != 2 * (noisy[1] - noisy[0])) or full > 2 * x.shape[1]:
        expected = "twice as many channels as are noisy" if noisy is None else f"{2 * (noisy[1] - noisy[0])} channels"
        raise ValueError(
            f"the output is {list(shape)} for an input {list(x.shape)}, expected {expected}, of which the second half "
            "are variances, and else the input's shape; a network without variances takes variances=False"
        )
    return full // 2


def path_input(prediction: Prediction, x: Tensor, t: Any, channels: int) -> Tensor:
    """What of a network's input is on the path: x itself, [B, channels, ...].

    Args:
        prediction: what is said of the network, a schedule among it.
        x: the network's input, [B, C, ...].
        t: time of the schedule.
        channels: how many the network predicts.

    Raises:
        ValueError: the input has another number of noisy channels than the output, or no such channels.
    """
    if prediction.noisy_channels is not None:
        start, stop = prediction.noisy_channels
        if x.ndim < 2 or stop > x.shape[1]:
            raise ValueError(f"noisy_channels is {(start, stop)}, but the input is {list(x.shape)}")
        x = x[:, start:stop]
    if x.ndim < 2 or x.shape[1] != channels:
        raise ValueError(
            f"the rule is applied in another parameterisation than the network's, for which every predicted channel "
            f"needs its noisy one; the output predicts {channels} channels, the input has {list(x.shape)[1:2]}: say "
            "which of them are noisy by prediction=fastens.schedules.Prediction(kind, noisy_channels=(start, stop)), "
            "and by variances=True or False whether the second half of the output are variances"
        )
    factor = input_factor(prediction, t)
    return x if factor is None else x / schedules.per_sample(factor, x)
