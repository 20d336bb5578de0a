"""How the scores of one call become one: in which parameterisation, with variances apart, at which noise level."""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fastens import parameterisation, reproducible, rules, schedules
from fastens.device import capturing
from fastens.engine.arguments import Arguments
from fastens.kernels._graph import keep
from fastens.ops import run_program
from fastens.ops.aggregate import aggregate
from fastens.outputs import as_stack
from fastens.schedules.prediction import PREDICTIONS

Combine = Callable[[Any], Tensor]


def aggregation(
    rule: rules.Rule,
    settings: dict[str, Any],
    prediction: schedules.Prediction,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Combine:
    """What makes one score [B, ...] of the members' scores [K, B, ...] in one call of an ensemble.

    Args:
        rule: a rule that evaluates all members.
        settings: of the ensemble: backend and aggregate_in.
        prediction: what the members predict, and under which schedule the time among the arguments is a noise level.
        forward: the members' forward, by whose signature the time is found.
        args: positional arguments of the call.
        kwargs: keyword arguments.

    Raises:
        ValueError: the rule or a conversion needs the noise level, and no argument is a time.
    """
    linear = rule.linear  # commutes with conversions, and averages variances as they are
    if linear and not rule.needs_noise_level:
        return lambda scores: aggregate(scores, rule, backend=settings["backend"])
    target = applied_in(rule, prediction, settings["aggregate_in"])
    arguments = Arguments(args, kwargs)
    if rule.needs_noise_level:
        time = parameterisation.time_of(forward, arguments, args, kwargs)
        combined = noise_dependent(rule, prediction.schedule, time, arguments.batch_size)
        if linear:
            return combined
    else:
        combined = functools.partial(aggregate, rule=rule, backend=settings["backend"])
    x = parameterisation.noisy_input(forward, arguments, args, kwargs)

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


def elements_apart(
    rule: rules.Rule,
    settings: dict[str, Any],
    prediction: schedules.Prediction,
    forward: Callable[..., Any],
    call: tuple[tuple[Any, ...], dict[str, Any]],
    shape: torch.Size,
) -> bool:
    """Whether elements of scores [B, ...] may be combined apart: nothing is converted, and no channels are variances.

    In deterministic mode, whether kernels do it whose elements have the same bits wherever they stand in a row: not
    torch's own functions, and not the logarithms of ``geometric``, which are contracted otherwise where a row ends.
    """
    if rule.needs_noise_level:
        return False
    if reproducible.enabled() and (isinstance(rule, rules.Geometric) or not by_kernels(rule, prediction, settings)):
        return False
    if rule.linear:
        return True
    args, kwargs = call
    x = parameterisation.noisy_input(forward, Arguments(args, kwargs), args, kwargs)
    channels = parameterisation.predicted_channels(prediction, x, shape)
    return applied_in(rule, prediction, settings["aggregate_in"]) in (None, prediction.kind) and channels == shape[1]


def _converted(
    combined: Combine, scores: Any, prediction: schedules.Prediction, target: str, x: Tensor, time: Any
) -> Tensor:
    """The rule applied in another parameterisation: converted, combined and converted back, in float32 at least.

    A score has one over the noise as a factor, which half precision does not hold where there is little.
    """
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
    if not (torch.compiler.is_compiling() or capturing()) and _has_gaps(schedule, kind, target, deviation):
        _check_determined(schedule, kind, target, t, deviation)
    stack = as_stack(scores if isinstance(scores, Tensor) else list(scores))
    wide = stack.to(torch.promote_types(stack.dtype, torch.float32))
    moved = parameterisation.convert(wide, noisy, t, schedule, kind, target, deviation)
    return parameterisation.convert(combined(moved), noisy, t, schedule, target, kind, deviation).to(stack.dtype)


def _determined(schedule: schedules.Schedule, kind: str, target: str, t: Any, deviation: float | None) -> bool:
    """Whether each of two predictions determines the other at these times: not where x is all data or all noise."""
    there = parameterisation.conversion(kind, target, schedule, t, deviation)
    back = parameterisation.conversion(target, kind, schedule, t, deviation)
    return all(bool(factor.isfinite().all()) for factor in (*there, *back))


@functools.lru_cache(maxsize=64)
def _has_gaps(schedule: schedules.Schedule, kind: str, target: str, deviation: float | None) -> bool:
    """Whether two predictions fail to determine each other at some times; only then must a call read its times."""
    ends = torch.tensor([0.0, 1.0, schedule.t_data, schedule.t_prior], dtype=torch.float64)  # two keep off 0 and 1
    return not _determined(schedule, kind, target, ends, deviation)


def _check_determined(schedule: schedules.Schedule, kind: str, target: str, t: Tensor, deviation: float | None) -> None:
    if not _determined(schedule, kind, target, t, deviation):
        known = (kind, *(each for each in PREDICTIONS if each != kind))
        others = [each for each in known if _determined(schedule, kind, each, t, deviation)]
        raise ValueError(
            f"the rule is applied in {target!r}, and the members predict {kind!r}; at the time {t.tolist()} the input "
            f"is noise alone, or data alone, and the one does not say the other: take aggregate_in= one of {others}, "
            "or begin at another time"
        )


def _warn_of_variances(rule: rules.Rule, shape: torch.Size, given: torch.Size) -> None:
    """Warn once that the second half of an output's channels is taken for variances, and how to say otherwise."""
    if not torch.compiler.is_compiling():
        warnings.warn(
            f"fastens: the output is {list(shape[1:])} for an input {list(given[1:])}: its second half is taken for "
            f"variances, which are averaged, and rule {rule.name!r} is applied to the first; "
            "prediction=fastens.schedules.Prediction(variances=True) says so, variances=False that all are predictions",
            stacklevel=2,
        )


def by_kernels(rule: rules.Rule, prediction: schedules.Prediction, settings: dict[str, Any]) -> bool:
    """Whether a rule is applied by kernels alone, which give an element the same bits wherever it stands.

    Raises:
        NotReproducible: the rule's result of a row depends on other rows.
    """
    if isinstance(rule, rules.Geometric) and rule.shift == "batch":
        raise reproducible.NotReproducible(
            "deterministic: geometric(shift='batch') shifts a row by other rows; take shift='sample'"
        )
    compiled = settings["backend"] != "reference" and run_program.available()
    plain = rule.linear or applied_in(rule, prediction, settings["aggregate_in"]) in (None, prediction.kind)
    return rule.has_kernels and not rule.needs_noise_level and compiled and plain


def of_each_row(combines: Sequence[Combine]) -> Combine:
    """Combine scores [K, B, ...] row by row, so that the bits of a row do not depend on other rows."""

    def whole(scores: Any) -> Tensor:
        with reproducible.one_thread():
            if len(combines) == 1:
                return combines[0](torch.stack(list(scores)))
            rows = enumerate(combines)
            return torch.cat([combine(torch.stack([score[i : i + 1] for score in scores])) for i, combine in rows])

    return whole


def summed(engine: Any, rule: rules.Rule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the mean that a GPU plan computes in its last layer, None where no plan of this call does.

    Args:
        engine: of the members, none where they are of different structure.
        rule: the ensemble's.
        args: positional arguments of a call.
        kwargs: keyword arguments.
    """
    if engine is None or not engine.kind.own_weights or not engine.plans.launched or type(rule) is not rules.Mean:
        return None
    weights = list(rule.weights or [1 / engine.num_members] * engine.num_members)
    found = engine.evaluate_sum(Arguments(args, kwargs), weights)
    return None if found is None else pytree.tree_unflatten([found[0]], found[1])


def noise_dependent(
    rule: rules.Rule, schedule: schedules.Schedule | None, network_time: Any, batch_size: int
) -> Combine:
    """The weighted mean, or sum, of a call at its noise level.

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


def applied_in(rule: rules.Rule, prediction: schedules.Prediction, aggregate_in: str | None) -> str | None:
    """Return the parameterisation that the rule is applied in, None for the one that the members predict.

    Raises:
        ValueError: a rule of scores, and what the members predict is not said, or is to be left for another.
    """
    if rule.linear or not rule.of_scores:
        return aggregate_in
    if aggregate_in not in (None, "epsilon", "score"):
        raise ValueError(
            f"rule {rule.name!r} is a sum of scores, and aggregate_in is {aggregate_in!r}; leave it out, or take "
            "weights that sum to 1"
        )
    if prediction.kind is None:
        raise ValueError(
            f"rule {rule.name!r} is a sum of scores, and what the members predict is not known; pass prediction= "
            "('epsilon', 'score', 'v', ...) to the ensemble, and schedule= where it is neither of the first two"
        )
    if prediction.kind in ("epsilon", "score"):  # one is the other scaled
        return None
    if prediction.schedule is None:
        raise ValueError(
            f"rule {rule.name!r} is a sum of scores, and the members predict {prediction.kind!r}, which a noise "
            "schedule converts: pass schedule= to the ensemble, one of fastens.schedules or the diffusers scheduler"
        )
    return "epsilon"


def check_rule(rule: rules.Rule, prediction: schedules.Prediction, settings: dict[str, Any]) -> None:
    """Raise ValueError where a rule needs to know more of the members than was said."""
    check_noise_level(rule, prediction.schedule)
    applied_in(rule, prediction, settings["aggregate_in"])


def check_noise_level(rule: rules.Rule, schedule: schedules.Schedule | None) -> None:
    """Raise ValueError where a rule needs the noise level and there is no schedule to tell it from the time."""
    if rule.needs_noise_level and schedule is None:
        raise ValueError(
            f"rule {rule.name!r} needs the noise level: pass schedule=, the noise schedule that the members were "
            "trained with (one of fastens.schedules, or the diffusers scheduler), to the ensemble"
        )


@functools.lru_cache(maxsize=64)
def _tables(rule: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Levels [L] and weights [L, K] in float64: once per device, so that a CUDA graph copies nothing from the host."""
    levels, weights = (torch.tensor(v, dtype=torch.float64) for v in (rule.log_snr, rule.weights))
    return levels.to(device), weights.to(device)


def weights_at(rule: Any, log_snr: Tensor) -> Tensor:
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
