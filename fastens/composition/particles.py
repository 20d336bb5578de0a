"""Samples as weighted particles: resampling, and steps of Langevin's dynamics at one noise level."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastens.ops.normal import normal


def effective_size(log_weights: Tensor) -> float:
    """Kish's effective sample size as a share of the samples, 1 where all weigh the same.

    Raises:
        RuntimeError: a weight that is no number, beside which no other counts.
    """
    weights = _shares(log_weights)
    return float(1 / weights.square().sum() / len(weights))


def systematic(log_weights: Tensor, seed: int, draw: int) -> Tensor:
    """Which particles go on, int64 [N]: each as often as its weight says, but for less than one (Kitagawa, 1996).

    Raises:
        RuntimeError: as :func:`effective_size`.
    """
    number = len(log_weights)
    device = log_weights.device
    shift = torch.special.ndtr(normal(seed, draw, torch.zeros(1, dtype=torch.int64, device=device), (1,)).double())
    at = (torch.arange(number, dtype=torch.float64, device=device) + shift.reshape(())) / number
    edges = _shares(log_weights).cumsum(0)
    return torch.searchsorted(edges, at).clamp_max(number - 1)


def _shares(log_weights: Tensor) -> Tensor:
    """The weights, of sum 1."""
    shares = log_weights.softmax(0)
    if shares.isnan().any():
        lost = (log_weights.isnan() | log_weights.isposinf()).nonzero()
        which = f"sample {int(lost[0])} of" if len(lost) else "all"
        raise RuntimeError(
            f"the weight of {which} {len(log_weights)} is not a number: scores or log-densities overflowed there; take "
            "more steps, or begin at less noise (start=)"
        )
    return shares


def mixed(weights: Tensor, values: Tensor) -> Tensor:
    """``sum_k w_k v_k`` of weights [K] or [K, B] and values [K, B, ...], in which one of weight zero is not used."""
    shaped = weights.reshape(*weights.shape, *(1,) * (values.ndim - weights.ndim))
    return torch.where(shaped == 0, 0.0, shaped * values).sum(0)


def langevin(
    y: Tensor,
    scores: Tensor,
    weights: Tensor,
    evaluate: Callable[[Tensor], Tensor],
    step: float,
    noise: Tensor,
    uniform: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One step of Langevin's dynamics for the density whose score is ``sum_k weights_k s_k``.

    Where it is accepted or refused (MALA), the log-density's difference is the integral of the score along the straight
    line between the two points (Sjoberg et al., "MCMC-correction of score-based diffusion models for model
    composition", arXiv 2307.14012), by Simpson's rule: the trapezoidal one, exact for Gaussians too, errs on the way
    from one mode to another, to the same side each time, which moves samples between them for good.

    Args:
        y: [B, ...].
        scores: of the members there, [K, B, ...].
        weights: [K].
        evaluate: the scores at other points.
        step: of the dynamics.
        noise: standard normal, [B, ...].
        uniform: in (0, 1), [B]; none to accept every step.

    Returns:
        The points after it, the members' scores there, by how much their log-densities changed [K, B], and which were
        accepted, bool [B].
    """
    drift = mixed(weights, scores)
    moved = step * drift + (2 * step) ** 0.5 * noise
    there = evaluate(y + moved)
    between = evaluate(y + 0.5 * moved)
    gained = ((scores + 4 * between + there) * moved).flatten(2).sum(2) / 6
    accepted = torch.ones(len(y), dtype=torch.bool, device=y.device)
    if uniform is not None:
        back = -moved - step * mixed(weights, there)
        forth = (2 * step) ** 0.5 * noise
        proposal = (forth.square() - back.square()).flatten(1).sum(1) / (4 * step)
        accepted = uniform.log() < mixed(weights, gained) + proposal
    keep = accepted.view(-1, *(1,) * (y.ndim - 1))
    return (
        torch.where(keep, y + moved, y),
        torch.where(keep, there, scores),
        torch.where(accepted, gained, 0.0),
        accepted,
    )
