"""A model seen as what it says about the noise in its input, whatever it predicts."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastens import parameterisation, rules
from fastens.aggregation import applied_in, noise_dependent
from fastens.engine.jvp import outputs_and_jvp
from fastens.ensemble import Ensemble
from fastens.internal import engine_of, settings_of
from fastens.ops.aggregate import aggregate
from fastens.schedules import Prediction, Schedule, per_sample


class Denoiser:
    """A model or an ensemble under a schedule: ``epsilon(x, t)`` of what was mixed as ``x = alpha x_0 + sigma eps``.

    Args:
        model: an :class:`fastens.Ensemble`, or any module called as ``model(x, t)`` that returns a tensor, a tuple that
            begins with one, or an object with ``.sample``. Of outputs with twice the channels (learned variances) the
            first half is the prediction.
        schedule: the noise schedule that it was trained under, or a diffusers scheduler, which also says what is
            predicted; none for an ensemble that has one.
        prediction: what it predicts: ``"epsilon"``, ``"x0"``, ``"v"``, ``"score"`` or ``"flow"``, or a
            :class:`fastens.schedules.Prediction`; none for what scheduler and ensemble say, else ``"epsilon"``.
        conditioning: further keyword arguments of the model, the same for all samples.

    Raises:
        ValueError: another prediction; schedule, prediction and ensemble contradict each other; no schedule; a network
            whose input has further channels than x.
        TypeError: a schedule that is none.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Any = None,
        prediction: str | Prediction | None = None,
        conditioning: Mapping[str, Any] | None = None,
    ) -> None:
        given = prediction if isinstance(prediction, Prediction) else Prediction(prediction)
        found = given.with_(parameterisation.read(schedule), "prediction=", parameterisation.source_of(schedule))
        said = getattr(model, "_prediction", None)  # of an ensemble, or a composition
        if isinstance(said, Prediction):
            found = found.with_(said, "the denoiser's arguments", "the ensemble")
        if found.schedule is None:
            raise ValueError("schedule: expected the noise schedule that the model was trained under, got none")
        found.check_said()
        if found.noisy_channels is not None:
            raise ValueError(
                f"noisy_channels is {found.noisy_channels}, but a denoiser calls model(x, t) with x alone; wrap the "
                "model in a module that adds the further channels"
            )
        self.model = model
        self.prediction = found.filled(kind="epsilon")
        self.conditioning = dict(conditioning or {})

    @property
    def schedule(self) -> Schedule:
        """The path ``x = alpha x_0 + sigma eps``."""
        assert self.prediction.schedule is not None
        return self.prediction.schedule

    @property
    def num_members(self) -> int:
        """K; 1 for a model that is no ensemble."""
        return self.model.num_members if isinstance(self.model, Ensemble) else 1

    @property
    def rule(self) -> rules.Rule:
        """The ensemble's rule; the mean for a single model."""
        return self.model.rule if isinstance(self.model, Ensemble) else rules.Mean()

    @property
    def device(self) -> torch.device:
        """The device of the model's parameters."""
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    def outputs(self, x: Tensor, t: Tensor) -> Tensor:
        """What every member predicts, [K, B, ...], from one folded pass; ``t`` is one time, or one per sample [B]."""
        if isinstance(self.model, Ensemble):
            output = self.model.member_outputs(self._input(x, t), self._network_time(x, t), **self.conditioning)
            output = output[0] if isinstance(output, tuple | list) else output
            return self._predicted(output, x)
        return self.at(x, t).unsqueeze(0)

    def outputs_and_jvp(self, x: Tensor, t: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor] | None:
        """What every member predicts, and the derivatives of that along a tangent of ``x``, each [K, B, ...].

        None where there is no plan that gives both, see :func:`fastens.engine.jvp.outputs_and_jvp`.
        """
        engine = engine_of(self.model) if isinstance(self.model, Ensemble) else None
        if engine is None or "_share" in vars(self.model):  # over a mesh, whose other ranks have other members
            return None
        arguments = (self._input(x, t), self._network_time(x, t))
        found = outputs_and_jvp(engine, arguments, self.conditioning, self._input(tangent, t))
        if found is None or found[0].shape[1] != len(x):
            return None
        outputs, moved = (self._predicted(part, x) for part in found)
        return outputs, moved

    def _predicted(self, outputs: Tensor, x: Tensor) -> Tensor:
        """The channels of outputs [K, B, ...] that are the prediction, shaped as ``x``; variances are left out."""
        predicted = outputs
        if outputs.ndim > 2:
            predicted = outputs[:, :, : parameterisation.predicted_channels(self.prediction, x, outputs[0].shape)]
        if predicted.shape[1:] != x.shape:
            raise ValueError(
                f"the model returned {list(outputs.shape[1:])} for an input {list(x.shape)}, expected its shape, or "
                "twice its channels where the second half are variances"
            )
        return predicted

    def epsilon(self, x: Tensor, t: Tensor) -> Tensor:
        """The noise that the model, or the ensemble by its rule, finds in ``x`` [B, ...]."""
        return self.to_epsilon(self.at(x, t), x, t)

    def combine(self, outputs: Tensor, rule: rules.Rule, x: Tensor, t: Tensor) -> Tensor:
        """What an ensemble of these members would predict for ``x``: their ``outputs`` [K, B, ...] under a rule.

        It is combined and converted in float32 at least, and of the outputs' dtype.
        """
        settings = settings_of(self.model) if isinstance(self.model, Ensemble) else {}
        kind = self._kind
        target = None if rule.linear else applied_in(rule, self.prediction, settings.get("aggregate_in"))
        target, deviation = target or kind, self.prediction.sigma_data
        wide = outputs if target == kind else outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        moved = parameterisation.convert(wide, x, t, self.schedule, kind, target, deviation)
        if rule.needs_noise_level:
            combine = noise_dependent(rule, self.schedule, self.schedule.network_time(t), outputs.shape[1])
        else:
            combine = functools.partial(aggregate, rule=rule, backend=settings.get("backend", "auto"))
        combined = combine(moved)
        return parameterisation.convert(combined, x, t, self.schedule, target, kind, deviation).to(outputs.dtype)

    @property
    def _kind(self) -> str:
        assert self.prediction.kind is not None
        return self.prediction.kind

    def to(self, target: str, predicted: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """A prediction for ``x`` [B, ...], or K of them [K, B, ...], in another parameterisation."""
        return parameterisation.convert(predicted, x, t, self.schedule, self._kind, target, self.prediction.sigma_data)

    def to_epsilon(self, predicted: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The noise in ``x`` [B, ...] according to a prediction [B, ...] or to K of them [K, B, ...]."""
        return self.to("epsilon", predicted, x, t)

    def factors(self, target: str, t: Tensor) -> tuple[float, float]:
        """The factors (a, b) of ``target = a x + b output`` at time ``t``: every parameterisation is linear in both."""
        of_x, of_output = parameterisation.conversion(self._kind, target, self.schedule, t, self.prediction.sigma_data)
        return float(of_x), float(of_output)

    def velocity(self, epsilon: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """``dx/dt`` of the probability-flow ODE, ``f x + (sigma' - f sigma) eps``, for the noise found in ``x``."""
        factor, noise_factor = self.velocity_factors(x, t)
        return factor * x + noise_factor * epsilon

    def velocity_factors(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of ``x`` and of the noise in :meth:`velocity`; each [] or [B, 1, ...]."""
        drift = self.schedule.drift(t)
        noise = self.schedule.sigma_rate(t) - drift * self.schedule.sigma(t)
        return per_sample(drift, x), per_sample(noise, x)

    def _network_time(self, x: Tensor, t: Tensor) -> Tensor:
        """The times [B] that the network takes for ``x`` [B, ...] at a time, or one per sample [B]."""
        return self.schedule.network_time(t).to(x.device, torch.promote_types(x.dtype, torch.float32)).expand(len(x))

    def _input(self, x: Tensor, t: Tensor) -> Tensor:
        """What the network takes for ``x`` [B, ...]."""
        factor = parameterisation.input_factor(self.prediction, t)
        return x if factor is None else (x * per_sample(factor, x)).to(x.dtype)

    def at(self, x: Tensor, t: Tensor) -> Tensor:
        """What the model, or the ensemble by its rule, predicts of ``x`` [B, ...] at a time, or one per sample [B]."""
        return self._called(x, self._input(x, t), self._network_time(x, t))

    def predict(self, x: Tensor, network_time: Tensor) -> Tensor:
        """What the model, or the ensemble by its rule, predicts of ``x`` [B, ...], at the network's own times [B]."""
        if self.prediction.input_scaling == "unit_variance":
            return self._called(x, self._input(x, self.schedule.time(network_time)), network_time)
        return self._called(x, x, network_time)

    def _called(self, x: Tensor, given: Tensor, network_time: Tensor) -> Tensor:
        output = self.model(given, network_time, **self.conditioning)
        output = getattr(output, "sample", output)
        output = output[0] if isinstance(output, tuple | list) else output
        if not isinstance(output, Tensor) or output.shape[:1] != x.shape[:1]:
            raise TypeError(f"the model returned a {type(output).__name__}, expected a tensor of {len(x)} samples")
        return self._predicted(output.unsqueeze(0), x)[0]


def check_data(name: str, data: Tensor, low: float = -1.0, high: float = 1.0) -> None:
    """Raise unless ``data`` is a batch of floating-point samples in [low, high].

    Raises:
        TypeError: no floating-point tensor.
        ValueError: no samples, NaN, or values out of range.
    """
    if not isinstance(data, Tensor) or not data.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor [N, ...], got {getattr(data, 'dtype', type(data))}")
    if data.ndim < 2 or len(data) == 0:
        raise ValueError(f"{name}: expected samples [N, ...] with N >= 1, got shape {list(data.shape)}")
    lowest, highest = float(data.min()), float(data.max())
    if not (low <= lowest and highest <= high):
        raise ValueError(
            f"{name}: values from {lowest:g} to {highest:g}, expected [{low:g}, {high:g}]; "
            "scale the data as it was for training, or pass data_range="
        )
