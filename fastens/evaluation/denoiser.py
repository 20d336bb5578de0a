"""A model seen as what it says about the noise in its input, whatever it predicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastens import rules
from fastens.ensemble import Ensemble
from fastens.ops.aggregate import aggregate
from fastens.schedules import Schedule, per_sample

PREDICTIONS = ("epsilon", "x0", "v", "score", "flow")


class Denoiser:
    """A model or an ensemble under a schedule: ``epsilon(x, t)`` of what was mixed as ``x = alpha x_0 + sigma eps``.

    Args:
        model: an :class:`fastens.Ensemble`, or any module called as ``model(x, t)`` that returns a tensor, a tuple that
            begins with one, or an object with ``.sample``. Of outputs with twice the channels (learned variances) the
            first half is the prediction.
        schedule: the noise schedule that it was trained under.
        prediction: what it predicts: ``"epsilon"``, ``"x0"``, ``"v"``, ``"score"`` or ``"flow"``.
        conditioning: further keyword arguments of the model, the same for all samples.

    Raises:
        ValueError: another prediction.
        TypeError: a schedule that is none.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        prediction: str = "epsilon",
        conditioning: Mapping[str, Any] | None = None,
    ) -> None:
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction: expected one of {', '.join(PREDICTIONS)}, got {prediction!r}")
        if not isinstance(schedule, Schedule):
            raise TypeError(
                f"schedule is a {type(schedule).__name__}, expected one of fastens.schedules; "
                "of a diffusers scheduler take fastens.schedules.from_scheduler(scheduler)"
            )
        self.model = model
        self.schedule = schedule
        self.prediction = prediction
        self.conditioning = dict(conditioning or {})

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
        """Where the model's parameters are."""
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    def outputs(self, x: Tensor, t: Tensor) -> Tensor:
        """What every member predicts, [K, B, ...], from one folded pass; ``t`` is one time, or one per sample [B]."""
        if isinstance(self.model, Ensemble):
            output = self.model.member_outputs(x, self._network_time(x, t), **self.conditioning)
            output = output[0] if isinstance(output, tuple | list) else output
            return output[:, :, : x.shape[1]] if output.ndim > 2 else output
        return self._predict(x, t).unsqueeze(0)

    def epsilon(self, x: Tensor, t: Tensor) -> Tensor:
        """The noise that the model, or the ensemble by its rule, finds in ``x`` [B, ...]."""
        return self.to_epsilon(self._predict(x, t), x, t)

    def combine(self, outputs: Tensor, rule: rules.Rule) -> Tensor:
        """What an ensemble of these members would predict: their ``outputs`` [K, B, ...] under a rule."""
        backend = self.model._settings["backend"] if isinstance(self.model, Ensemble) else "auto"
        return aggregate(outputs, rule, backend=backend)

    def to_epsilon(self, predicted: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The noise in ``x`` [B, ...] according to a prediction [B, ...] or to K of them [K, B, ...]."""
        if self.prediction == "epsilon":
            return predicted
        alpha, sigma = self.schedule.coefficients(t, x)
        if self.prediction == "score":
            return -sigma * predicted
        if self.prediction == "x0":
            return (x - alpha * predicted) / sigma
        if self.prediction == "v":
            return (alpha * predicted + sigma * x) / (alpha.square() + sigma.square())
        alpha_rate, sigma_rate = self._rates(x, t)
        return (alpha * predicted - alpha_rate * x) / (alpha * sigma_rate - alpha_rate * sigma)

    def velocity(self, epsilon: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """``dx/dt`` of the probability-flow ODE, ``f x + (sigma' - f sigma) eps``, for the noise found in ``x``."""
        factor, noise_factor = self.velocity_factors(x, t)
        return factor * x + noise_factor * epsilon

    def velocity_factors(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Of ``x`` and of the noise in the velocity; each [] or [B, 1, ...]."""
        drift = self.schedule.drift(t)
        noise = self.schedule.sigma_rate(t) - drift * self.schedule.sigma(t)
        return per_sample(drift, x), per_sample(noise, x)

    def _rates(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return per_sample(self.schedule.alpha_rate(t), x), per_sample(self.schedule.sigma_rate(t), x)

    def _network_time(self, x: Tensor, t: Tensor) -> Tensor:
        return self.schedule.network_time(t).to(x.device, torch.promote_types(x.dtype, torch.float32)).expand(len(x))

    def _predict(self, x: Tensor, t: Tensor) -> Tensor:
        return self.predict(x, self._network_time(x, t))

    def predict(self, x: Tensor, network_time: Tensor) -> Tensor:
        """What the model, or the ensemble by its rule, predicts of ``x`` [B, ...], at the network's own times [B]."""
        output = self.model(x, network_time, **self.conditioning)
        output = getattr(output, "sample", output)
        output = output[0] if isinstance(output, tuple | list) else output
        if not isinstance(output, Tensor) or output.shape[:1] != x.shape[:1]:
            raise TypeError(f"the model returned a {type(output).__name__}, expected a tensor of {len(x)} samples")
        return output[:, : x.shape[1]] if output.ndim > 1 else output


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
