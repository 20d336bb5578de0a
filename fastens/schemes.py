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
        [B, ...], of the samples' dtype; added up in float32 at least.

    Raises:
        TypeError: samples of no floating-point dtype, such as images in bytes, whose sum does not fit into their dtype.
    """
    total: Tensor | None = None
    dtype = torch.float32
    for member in ensemble.members:
        end = sample(member, torch.Generator(device).manual_seed(seed))
        if not end.is_floating_point():
            raise TypeError(
                f"mean_of_samples: the samples are {end.dtype}, expected a floating-point dtype; return them as the "
                "sampler has them, before they are made bytes, or end.float()"
            )
        dtype = end.dtype
        wide = end.to(torch.promote_types(dtype, torch.float32))
        total = wide if total is None else total + wide
    assert total is not None
    return (total / ensemble.num_members).to(dtype)


class _Averaged(TorchFunctionMode):
    def __init__(self, num_members: int, first: int) -> None:
        super().__init__()
        self._members, self._left = num_members, first

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        counted = isinstance(func, torch._ops.OpOverloadPacket) and _draws_from_counters(func, args)
        if not counted and func not in (torch.randn, torch.randn_like):
            return func(*args, **kwargs)
        if self._left > 0:
            self._left -= 1
            return func(*args, **kwargs)
        if counted:
            raise RuntimeError(
                f"averaged_noise: {func} takes its noise from counters, which it does not reach: take a sampler that "
                "draws by torch.randn, or, of one of fastens, eta=0"
            )
        out = kwargs.get("out")
        if out is not None:  # each draw is a tensor of its own, of the dtype and device of the one to fill
            kwargs = {"dtype": out.dtype, "device": out.device, **{n: v for n, v in kwargs.items() if n != "out"}}
        return torch.mean(torch.stack([func(*args, **kwargs) for _ in range(self._members)]), 0, out=out)


def _draws_from_counters(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether one of our ops draws the noise of numbered samples."""
    if not str(func).startswith("fastens."):
        return False
    names = [argument.name for argument in func.default._schema.arguments]
    return "samples" in names[: len(args)] and args[names.index("samples")] is not None


@contextmanager
def averaged_noise(num_members: int, first: int = 1) -> Iterator[None]:
    """Deviation: a scope in which a sampler's noise is the mean of K Gaussians, of deviation 1/sqrt(K).

    It reaches every ``torch.randn`` and ``torch.randn_like`` inside, which is where samplers take their noise.

    Args:
        num_members: K.
        first: draws that are left alone: the one that makes the starting noise.

    Raises:
        ValueError: no members.
        RuntimeError: inside, where a sampler takes more noise from counters, as those of fastens do.
    """
    if num_members < 1:
        raise ValueError(f"averaged_noise: num_members is {num_members}, expected at least one")
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
        wide = torch.promote_types(score.dtype, torch.float32)
        norm = [torch.linalg.vector_norm(x.reshape(len(x), -1).to(wide), dim=1) for x in (score, z)]
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
