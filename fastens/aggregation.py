"""How the scores of one call become one: in which parameterisation, with variances apart, at which noise level."""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fastens import parameterisation, rules, schedules
from fastens.fold.arguments import Arguments
from fastens.kernels._graph import keep
from fastens.ops.aggregate import aggregate
from fastens.outputs import stacked

Combine = Callable[[Any], Tensor]


def aggregation(
    rule: rules.Rule,
    settings: dict[str, Any],
    schedule: schedules.Schedule | None,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Combine:
    """What makes one score [B, ...] of the members' scores [K, B, ...] in one call of an ensemble.

    Args:
        rule: a rule that evaluates all members.
        settings: of the ensemble: backend, prediction and aggregate_in.
        schedule: by which the time among the arguments becomes a noise level.
        forward: the members' forward, by whose signature the time is found.
        args: positional arguments of the call.
        kwargs: keyword arguments.

    Raises:
        ValueError: the rule or a conversion needs the noise level, and no argument is a time.
    """
    linear = rule.linear  # commutes with conversions, and averages variances as they are
    if linear and not rule.needs_noise_level:
        return lambda scores: aggregate(scores, rule, backend=settings["backend"])
    prediction, target = settings["prediction"].filled(schedule=schedule), settings["aggregate_in"]
    arguments = Arguments(args, kwargs)
    if linear:
        time = parameterisation.time_of(forward, arguments, args, kwargs)
        return noise_dependent(rule, schedule, time, arguments.batch_size)
    x = parameterisation.noisy_input(forward, arguments, args, kwargs)

    def combined(scores: Any) -> Tensor:
        return aggregate(scores, rule, backend=settings["backend"])

    def whole(scores: Any) -> Tensor:
        shape = scores[0].shape
        channels, variances = parameterisation.predicted_channels(prediction, x, shape), None
        if len(shape) > 1 and channels < shape[1]:
            if prediction.variances is None:
                _warn_of_variances(rule, shape, x.shape)
            variances = aggregate([score[:, channels:] for score in scores], "mean", backend=settings["backend"])
            scores = [score[:, :channels] for score in scores]
        if target in (None, prediction.kind):
            out = combined(scores)
        else:
            time = parameterisation.time_of(forward, arguments, args, kwargs)
            out = _converted(combined, scores, prediction, target, x, time)
        return out if variances is None else torch.cat([out, variances], 1)

    return whole


def _converted(
    combined: Combine, scores: Any, prediction: schedules.Prediction, target: str, x: Tensor, time: Any
) -> Tensor:
    """The rule applied in another parameterisation: converted, combined and converted back."""
    schedule, kind, deviation = prediction.schedule, prediction.kind, prediction.sigma_data
    assert schedule is not None
    assert kind is not None
    t = schedule.time(time)
    if t.numel() != 1 and t.numel() != len(x):
        raise ValueError(f"the time is {list(t.shape)}, expected one number, or one per sample, [{len(x)}]")
    shape = scores[0].shape
    noisy = parameterisation.path_input(prediction, x, t, shape[1] if len(shape) > 1 else 1)
    if noisy.shape != shape:
        raise ValueError(
            f"the rule is applied in {target!r}, and the output is {list(shape)}, expected the shape of the noisy "
            f"input, {list(noisy.shape)}; leave aggregate_in out, or let the members return their prediction alone"
        )
    stack = stacked(scores if isinstance(scores, Tensor) else list(scores))
    moved = parameterisation.convert(stack, noisy, t, schedule, kind, target, deviation)
    return parameterisation.convert(combined(moved), noisy, t, schedule, target, kind, deviation)


def _warn_of_variances(rule: rules.Rule, shape: torch.Size, given: torch.Size) -> None:
    """Say once what is supposed of an output of twice the channels, and how to say it oneself."""
    if not torch.compiler.is_compiling():
        warnings.warn(
            f"fastens: the output is {list(shape[1:])} for an input {list(given[1:])}: its second half is taken for "
            f"variances, which are averaged, and rule {rule.name!r} is applied to the first; "
            "prediction=fastens.schedules.Prediction(variances=True) says so, variances=False that all are predictions",
            stacklevel=2,
        )


def summed(engine: Any, rule: rules.Rule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an ensemble returns under a mean, where a plan on a GPU takes it in its last layer; else none.

    Args:
        engine: of the members, none where they are of different structure.
        rule: the ensemble's.
        args: positional arguments of a call.
        kwargs: keyword arguments.
    """
    if engine is None or not engine.sums or not engine.plans.launched or type(rule) is not rules.Mean:
        return None
    weights = list(rule.weights or [1 / engine.num_members] * engine.num_members)
    found = engine.evaluate_sum(Arguments(args, kwargs), weights)
    return None if found is None else pytree.tree_unflatten([found[0]], found[1])


def noise_dependent(
    rule: rules.NoiseDependentMean, schedule: schedules.Schedule | None, network_time: Any, batch_size: int
) -> Combine:
    """The weighted mean of a call at its noise level.

    Args:
        rule: weights by noise level.
        schedule: by which the time becomes a noise level.
        network_time: the time as the network takes it: a number, or a tensor of one or ``batch_size`` elements.
        batch_size: B.

    Raises:
        ValueError: no schedule, or times of another number.
    """
    check_noise_level(rule, schedule)
    assert schedule is not None
    t = schedule.time(network_time)
    if t.numel() != 1 and t.numel() != batch_size:
        raise ValueError(f"the time is {list(t.shape)}, expected one number, or one per sample, [{batch_size}]")
    weights = weights_at(rule, schedule.log_snr(t.reshape(-1)))  # [K, B] or [K, 1]
    return lambda scores: weighted_sum(scores, weights)


def check_noise_level(rule: rules.Rule, schedule: schedules.Schedule | None) -> None:
    """Raise ValueError where a rule needs the noise level and there is no schedule to tell it from the time."""
    if rule.needs_noise_level and schedule is None:
        raise ValueError(
            f"rule {rule.name!r} needs the noise level: pass schedule=, the noise schedule that the members were "
            "trained with (one of fastens.schedules, or the diffusers scheduler), to the ensemble"
        )


@functools.lru_cache(maxsize=64)
def _tables(rule: rules.NoiseDependentMean, device: torch.device) -> tuple[Tensor, Tensor]:
    """Levels [L] and weights [L, K] in float64: once per device, so that a CUDA graph copies nothing from the host."""
    levels, weights = (torch.tensor(v, dtype=torch.float64) for v in (rule.log_snr, rule.weights))
    return levels.to(device), weights.to(device)


def weights_at(rule: rules.NoiseDependentMean, log_snr: Tensor) -> Tensor:
    """The members' weights at noise levels.

    Args:
        rule: weights by noise level.
        log_snr: ``log(alpha^2 / sigma^2)``, [B]; infinite ones are the nearest level's, NaN gives NaN.

    Returns:
        float64 [K, B].
    """
    levels, weights = keep(_tables(rule, log_snr.device))
    if len(levels) == 1:
        return weights[0].unsqueeze(1).expand(-1, len(log_snr))
    level = log_snr.to(torch.float64).clamp(levels[0], levels[-1])
    right = torch.searchsorted(levels, level).clamp(1, len(levels) - 1)
    share = ((level - levels[right - 1]) / (levels[right] - levels[right - 1])).unsqueeze(1)
    return torch.lerp(weights[right - 1], weights[right], share).T


def weighted_sum(scores: Tensor | Sequence[Tensor], weights: Tensor) -> Tensor:
    """``sum_k w_k S_k`` with weights of each sample, in which a member of weight zero is not used, NaN or not.

    Args:
        scores: [K, B, ...], or K tensors [B, ...].
        weights: [K, B], or [K, 1] for all samples alike.

    Returns:
        [B, ...], of the scores' dtype, added up in float32 at least.

    Raises:
        ValueError: scores of another number of samples.
    """
    first = scores[0]
    if weights.shape[1] not in (1, first.shape[0]):
        raise ValueError(
            f"the members return {list(first.shape)} under weights of each of {weights.shape[1]} samples, "
            f"expected [{weights.shape[1]}, ...]"
        )
    wide = torch.promote_types(first.dtype, torch.float32)
    factors = weights.to(first.device, wide).reshape(len(weights), -1, *(1,) * (first.ndim - 1))
    used = factors != 0
    total = torch.zeros((), dtype=wide, device=first.device)
    for factor, use, score in zip(factors, used, scores, strict=True):
        total = torch.addcmul(total, factor, torch.where(use, score.to(wide), 0))
    return total.to(first.dtype)
