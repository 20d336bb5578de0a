"""The noising path in coordinates in which all schedules are one: ``y = x / alpha``, with noise ``r = sigma / alpha``.

There the drift is gone and ``u = r^2`` is time: the noised density of each member solves the heat equation
``dp/du = Laplace(p) / 2``. Sampling runs from large u to small by ``dy = (1 + eta) / 2 S (-du) + sqrt(eta) dw``, with
the SDE at eta = 1 and the probability-flow ODE at 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastens.evaluation.denoiser import Denoiser
from fastens.evaluation.levels import levels


class Path:
    """The members' scores along the path.

    Args:
        denoiser: of the members.
        steps: of the sampler.
        start: the greatest noise-to-signal ratio.
    """

    def __init__(self, denoiser: Denoiser, steps: int, start: float | None) -> None:
        self.denoiser = denoiser
        self.ratios, self.times = levels(denoiser.schedule, steps, start)
        self.u = self.ratios.square().tolist()
        self.dtype = next((p.dtype for p in denoiser.model.parameters() if p.is_floating_point()), torch.float32)

    def alpha(self, i: int) -> float:
        """Factor of the data at level i."""
        return float(self.denoiser.schedule.alpha(self.times[i]))

    def scores(self, y: Tensor, i: int) -> Tensor:
        """The members' scores of y, float64 [K, B, ...], at level i."""
        x = (self.alpha(i) * y).to(self.dtype)
        epsilon = self.denoiser.to_epsilon(self.denoiser.outputs(x, self.times[i]), x, self.times[i])
        return epsilon.to(torch.float64) / -float(self.ratios[i])

    def scores_along(self, y: Tensor, i: int, probes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores, estimates of their divergence, and the variance of those: [K, B, ...], [K, B] and [K, B].

        Hutchinson's estimate ``z^T J z`` from probes of random signs [P, B, ...], all members in one pass each. With
        one probe its variance, ``2 (|J|^2 - sum_i J_ii^2)`` for a symmetric J, is bounded by ``2 (|J|^2 - (tr J)^2 /
        D)``, which ``|J z|^2`` and ``z^T J z`` estimate; with more probes it is that of their mean.
        """
        denoiser, t = self.denoiser, self.times[i]
        alpha, ratio = self.alpha(i), float(self.ratios[i])
        x = (alpha * y).to(self.dtype)
        traces, norms, scores = [], [], None
        for probe in probes.to(x):
            found = denoiser.outputs_and_jvp(x, t, probe)
            outputs, moved = found if found is not None else self._backward(x, t, probe)
            epsilon, moved = denoiser.to_epsilon(outputs, x, t), denoiser.to_epsilon(moved, probe, t)
            moved = moved.to(torch.float64) * (-alpha / ratio)
            scores = epsilon.to(torch.float64) / -ratio
            traces.append((moved * probe).flatten(2).sum(2))
            norms.append(moved.square().flatten(2).sum(2))
        assert scores is not None
        trace = torch.stack(traces)
        if len(traces) > 1:
            return scores, trace.mean(0), trace.var(0) / len(traces)
        size = math.prod(y.shape[1:])
        bound = 2 * (norms[0] - trace[0].square() / size) * (size / (size - 2) if size > 2 else 1.0)
        return scores, trace[0], bound.clamp_min(0)

    def _backward(self, x: Tensor, t: Tensor, probe: Tensor) -> tuple[Tensor, Tensor]:
        """The members' outputs, and probe^T J of each, by going backward through them."""
        with torch.enable_grad():
            inner = x.detach().requires_grad_()
            outputs = self.denoiser.outputs(inner, t)
            moved = [
                torch.autograd.grad(output, inner, probe, retain_graph=True, materialize_grads=True)[0]
                for output in outputs
            ]
        return outputs.detach(), torch.stack(moved)
