"""Schemes at the level of the sampler, beside the rules: they wrap any family's own sampling function."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastens.ensemble import Ensemble

__all__ = ["ScoreNoise", "averaged_noise", "mean_of_samples"]


def mean_of_samples(
    ensemble: Ensemble, sample: Callable[[nn.Module, torch.Generator], Tensor], seed: int = 0, device: Any = "cpu"
) -> Tensor:
    """Run K whole trajectories from the same noise, one per member, and average their ends.

    Args:
        ensemble: whose members are taken one at a time.
        sample: runs a sampler on a member with all its noise from the generator, and returns samples [B, ...].
        seed: every trajectory gets a generator of this seed.
        device: of the generators.

    Returns:
        [B, ...].
    """
    total: Tensor | None = None
    for member in ensemble.members:
        end = sample(member, torch.Generator(device).manual_seed(seed))
        total = end.clone() if total is None else total + end
    assert total is not None
    return total / ensemble.num_members


class _Averaged(TorchFunctionMode):
    def __init__(self, num_members: int, first: int) -> None:
        super().__init__()
        self._members, self._left = num_members, first

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in (torch.randn, torch.randn_like):
            return func(*args, **kwargs)
        if self._left > 0:
            self._left -= 1
            return func(*args, **kwargs)
        draws = [func(*args, **kwargs) for _ in range(self._members)]
        return torch.stack(draws).mean(0)


@contextmanager
def averaged_noise(num_members: int, first: int = 1) -> Iterator[None]:
    """Deviation: a scope in which a sampler's noise is the mean of K Gaussians, of deviation 1/sqrt(K).

    It reaches every ``torch.randn`` and ``torch.randn_like`` inside, which is where samplers take their noise.

    Args:
        num_members: K.
        first: draws that are left alone: the one that makes the starting noise.
    """
    with _Averaged(num_members, first):
        yield


class ScoreNoise(nn.Module):
    """The control experiment: the score s becomes s + scale * |s| / (|z| + 1e-8) * z for each sample, with z fixed.

    Args:
        model: a network or an ensemble that returns a tensor [B, ...].
        scale: size of the noise beside the score.
        seed: of z, which depends on the sample's place in the batch.
    """

    def __init__(self, model: nn.Module, scale: float, seed: int = 0) -> None:
        super().__init__()
        self.model = model
        self.scale, self.seed = scale, seed

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Evaluate the model and disturb its output."""
        score = self.model(*args, **kwargs)
        if not isinstance(score, Tensor):
            raise TypeError(
                f"the model returns a {type(score).__name__}, expected a tensor; pass return_dict=False inside"
            )
        rows = [
            torch.randn(score.shape[1:], generator=torch.Generator().manual_seed(self.seed * 1_000_003 + i))
            for i in range(len(score))
        ]
        z = torch.stack(rows).to(score) if rows else score
        norm = [torch.linalg.vector_norm(x.flatten(1).float(), dim=1) for x in (score, z)]
        factor = self.scale * norm[0] / (norm[1] + 1e-8)
        return score + (factor.reshape(-1, *(1,) * (score.ndim - 1)) * z).to(score.dtype)

    def __getattr__(self, name: str) -> Any:
        """Look like the model."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(super().__getattr__("model"), name)
