"""What members are composed to by their densities: the mixture of them, or where they are equal."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Or:
    """The mixture of the members' densities, ``sum_k w_k p_k``: the score is ``sum_k w_k p_k s_k / sum_k w_k p_k``.

    Args:
        weights: of the members, K numbers above 0 of any sum; none for equal ones.
        temperature: what log-densities are divided by; 1 is the mixture, less picks the likelier member harder.

    Raises:
        ValueError: weights or a temperature that are not finite and above 0.
    """

    weights: Sequence[float] | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Check the numbers."""
        for value in (*(self.weights or ()), self.temperature):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"Or: weights are {self.weights} and temperature {self.temperature}, expected above 0")
        if self.weights is not None:
            object.__setattr__(self, "weights", tuple(map(float, self.weights)))

    def shares(self, log_densities: Tensor) -> Tensor:
        """How much of each member's score is taken, float64 [K, B], of log-densities [K, B]."""
        logits = log_densities / self.temperature
        if self.weights is not None:
            logits = logits + torch.tensor(self.weights, dtype=logits.dtype, device=logits.device).log()[:, None]
        return logits.softmax(0)


@dataclasses.dataclass(frozen=True)
class And:
    """Where the members' densities are equal (Skreta et al., "The superposition of diffusion models", ICLR 2025).

    At each step the scores are mixed by shares that sum to 1, of either sign, such that all log-densities become equal:
    a linear system of K equations for each sample, solved by regularised least squares, because where there is much
    noise all scores are alike.

    Args:
        ridge: of that, relative to the scores' squared norm.

    Raises:
        ValueError: a ridge that is not finite and above 0.
    """

    ridge: float = 1e-3

    def __post_init__(self) -> None:
        """Check the number."""
        if not (math.isfinite(self.ridge) and self.ridge > 0):
            raise ValueError(f"And: ridge is {self.ridge}, expected above 0")

    def shares(self, gram: Tensor, reached: Tensor, gain: float) -> Tensor:
        """How much of each member's score is taken, float64 [K, B].

        Args:
            gram: products of scores, [B, K, K].
            reached: log-densities after the step but for what the scores to be mixed move, [K, B].
            gain: of that: log-density i moves by ``gain sum_j share_j gram_ij``.
        """
        size = gram.shape[-1]
        equal = torch.full((size,), 1 / size, dtype=gram.dtype, device=gram.device)
        system = gain * (gram - gram.mean(1, keepdim=True))  # what a share does to the differences
        gap = (reached - reached.mean(0)).T + system @ equal
        centred = torch.eye(size, dtype=gram.dtype, device=gram.device) - 1 / size  # shares keep their sum
        system = system @ centred
        scale = (gain * gram.diagonal(dim1=1, dim2=2).mean(1)).square().clamp_min(1e-30)
        normal = system.mT @ system + (self.ridge * scale)[:, None, None] * torch.eye(size).to(gram)
        moved = torch.linalg.solve(normal, -(system.mT @ gap.unsqueeze(-1))).squeeze(-1)
        return (equal + moved @ centred).T
