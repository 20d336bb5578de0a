"""The probability-flow ODE with its log-density, drift and divergence from one shared forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastens.draws import assigned_to
from fastens.evaluation.denoiser import Denoiser
from fastens.schedules import Schedule

FIXED_STEP = ("euler", "midpoint", "heun2", "heun3", "rk4")
ADAPTIVE = ("dopri5", "dopri8", "bosh3", "adaptive_heun")


class AugmentedFlow:
    """``d(x, log p)/dt`` along the probability-flow ODE ``dx/dt = f x + (sigma' - f sigma) eps(x, t)``.

    The divergence, ``f D + (sigma' - f sigma) div eps``, is estimated as the mean of ``z^T (d eps/dx) z`` over probes z
    (Hutchinson), or summed exactly over the D unit vectors. Where an ensemble has plans, the pass that gives the drift
    carries z along (forward mode, a Jacobian-vector product); elsewhere one pass is gone back through (vector-Jacobian
    products). Both are the same number (Song et al., ICLR 2021, appendix D.2; there: two passes).

    Args:
        denoiser: the model under its schedule.
        probes: [P, B, ...], or none for the exact divergence.
        dtype: of what the model is given; the state may be wider. None for the state's.

    Attributes:
        evaluations: forward passes so far.
    """

    def __init__(self, denoiser: Denoiser, probes: Tensor | None, dtype: torch.dtype | None = None) -> None:
        self.denoiser = denoiser
        self.probes = probes
        self.dtype = dtype
        self.evaluations = 0

    def __call__(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The derivative of ``x`` [B, ...] and of the gain in log-density [B] at the time ``t`` []."""
        self.evaluations += 1
        x = state[0].detach()
        given = x if self.dtype is None else x.to(self.dtype)
        found = self._forward_mode(given, t) or self._reverse_mode(given, t)
        epsilon, divergence = (each.to(x.dtype) for each in found)
        factor, noise_factor = self.denoiser.velocity_factors(x, t)
        rate = factor * x[0].numel() + noise_factor * divergence
        return factor * x + noise_factor * epsilon, rate

    def _forward_mode(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the noise and its divergence by forward-mode derivatives, None where the members allow none."""
        denoiser, total = self.denoiser, _nothing(x)
        epsilon = None
        if denoiser.rule.random or assigned_to(denoiser.model) is not None:
            return None
        for direction in self._directions(x):
            found = denoiser.outputs_and_jvp(x, t, direction)
            if found is None:
                return None
            outputs, moved = found
            with torch.enable_grad():  # what is left to go back through: the rule, and the conversion to noise
                inner, outputs = x.clone().requires_grad_(), outputs.detach().requires_grad_()
                predicted = denoiser.combine(outputs, denoiser.rule, inner, t)
                epsilon = denoiser.to_epsilon(predicted, inner, t)
                of_x, of_outputs = torch.autograd.grad(
                    epsilon, (inner, outputs), direction, allow_unused=True, materialize_grads=True
                )
            total = total + _products(of_outputs, moved).sum(0) + _products(of_x[None], direction[None])[0]
        assert epsilon is not None
        return epsilon.detach(), total if self.probes is None else total / len(self.probes)

    def _directions(self, x: Tensor) -> Iterator[Tensor]:
        """The probes, or the unit vectors, each [B, ...]."""
        if self.probes is not None:
            yield from self.probes
            return
        for i in range(x[0].numel()):
            unit = torch.zeros_like(x).flatten(1)
            unit[:, i] = 1
            yield unit.view_as(x)

    def _reverse_mode(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            epsilon = self.denoiser.epsilon(x, t)
            divergence = self._divergence(epsilon, x)
        return epsilon.detach(), divergence

    def _divergence(self, epsilon: Tensor, x: Tensor) -> Tensor:
        if self.probes is None:
            size = x[0].numel()
            flat = epsilon.flatten(1)
            parts = [
                torch.autograd.grad(flat[:, i].sum(), x, retain_graph=i < size - 1)[0].flatten(1)[:, i]
                for i in range(size)
            ]
            return torch.stack(parts).sum(0)
        total = _nothing(x)
        for i, probe in enumerate(self.probes):
            (product,) = torch.autograd.grad(epsilon, x, probe, retain_graph=i < len(self.probes) - 1)
            total = total + _products(product[None], probe[None])[0]
        return total / len(self.probes)


def _nothing(x: Tensor) -> Tensor:
    """A sum of each sample [B, ...] to begin with, [B]: in float32 at least."""
    return torch.zeros(len(x), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of samples [K, B, ...], [K, B], in float32 at least."""
    wide = torch.promote_types(a.dtype, torch.float32)
    return (a.to(wide) * b.to(wide)).flatten(2).sum(2)


def time_grid(schedule: Schedule, steps: int) -> Tensor:
    """Times of equal work between data and prior, float64 [steps + 1]: denser where there is little noise.

    Equally spaced in the cube root of time for the VP processes (counted from where a discrete one has no noise), in
    the logarithm of sigma for EDM, and in time for the others.

    Raises:
        ValueError: fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}, expected at least 1")
    first, last = schedule.t_data, schedule.t_prior
    share = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    if schedule.name in ("vp", "sub_vp", "discrete"):
        shift = 1.0 if schedule.name == "discrete" else 0.0
        low, high = (first + shift) ** (1 / 3), (last + shift) ** (1 / 3)
        times = (low + share * (high - low)) ** 3 - shift
    elif schedule.name == "edm":
        times = first * (last / first) ** share
    else:
        times = first + share * (last - first)
    times[0], times[-1] = first, last
    return times


def integrate(
    flow: Callable[[Tensor, tuple[Tensor, Tensor]], tuple[Tensor, Tensor]],
    start: tuple[Tensor, Tensor],
    schedule: Schedule,
    method: str,
    steps: int,
    rtol: float,
    atol: float,
) -> tuple[Tensor, Tensor]:
    """Solve the ODE with torchdiffeq, on the device of the state.

    Args:
        flow: the derivative.
        start: state at the first time.
        schedule: from its time of data to its time of the prior.
        method: one of torchdiffeq's adaptive methods, or of its fixed-step methods.
        steps: of a fixed-step method, on :func:`time_grid`.
        rtol: relative tolerance of an adaptive method.
        atol: absolute tolerance of an adaptive method.

    Raises:
        ModuleNotFoundError: torchdiffeq is not installed.
        ValueError: an unknown method.
        RuntimeError: the step size of an adaptive method underflowed.
    """
    if method not in FIXED_STEP + ADAPTIVE:
        raise ValueError(f"method: expected one of {', '.join(ADAPTIVE + FIXED_STEP)}, got {method!r}")
    from torchdiffeq import odeint

    device = start[0].device
    if method in FIXED_STEP:
        grid = time_grid(schedule, steps).to(device)
        ends = odeint(flow, start, grid, method=method)
    else:
        grid = torch.tensor((schedule.t_data, schedule.t_prior), dtype=torch.float64, device=device)
        try:
            ends = odeint(flow, start, grid, method=method, rtol=rtol, atol=atol)
        except AssertionError as error:
            raise RuntimeError(
                f"{method} found no step small enough for rtol {rtol:g} and atol {atol:g}: {error}; the field may be "
                "rough or not a number: loosen the tolerances, or take a fixed-step method"
            ) from error
    return ends[0][-1], ends[1][-1]
