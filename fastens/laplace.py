"""Laplace: members drawn from a diagonal Gaussian posterior around one checkpoint."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastens.ensemble import Ensemble
from fastens.members import copy_of
from fastens.modes import evaluating

Loss = Callable[[nn.Module, Any], Tensor]


def squared_gradients(model: nn.Module, loss: Loss, data: Iterable[Any]) -> dict[str, Tensor]:
    """The diagonal H of the empirical Fisher information, the sum over samples of squared gradients.

    Args:
        model: the checkpoint; left as it is.
        loss: loss(model, batch) gives the denoising losses [B], one per sample. Take times and noises from a seeded
            generator to get the same members again.
        data: batches.

    Returns:
        One tensor per trainable parameter, by name, in float32 at least; of a complex one [..., 2], its real and
        imaginary parts'.

    Raises:
        ValueError: no data, losses that are not one number per sample, or parameters without gradient.
    """
    with torch.inference_mode(False), torch.enable_grad():
        return _squared_gradients(evaluating(copy_of(model)), loss, data)


def _squared_gradients(model: nn.Module, loss: Loss, data: Iterable[Any]) -> dict[str, Tensor]:
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError("the model has no trainable parameters")
    total = {name: torch.zeros_like(_parts(p), dtype=_wide(p)) for name, p in trainable.items()}
    count = 0
    for batch in data:
        losses = loss(model, batch)
        if losses.ndim != 1:
            raise ValueError(f"loss returns {list(losses.shape)}, expected one number for each sample, [B]")
        for i in range(len(losses)):
            keep = i + 1 < len(losses)
            grads = torch.autograd.grad(losses[i], list(trainable.values()), retain_graph=keep, allow_unused=True)
            for name, grad in zip(trainable, grads, strict=True):
                if grad is not None:
                    total[name] += _parts(grad).to(total[name].dtype) ** 2
            count += 1
    if not count:
        raise ValueError("data is empty, expected at least one batch")
    return total


def _parts(x: Tensor) -> Tensor:
    """The real numbers that a tensor consists of: of a complex one [..., 2], in its memory."""
    x = x.detach()
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def _wide(p: Tensor) -> torch.dtype:
    return torch.promote_types(_parts(p).dtype, torch.float32)


class LaplaceMembers(Sequence[nn.Module]):
    """K draws theta + tau (H + lambda)^(-1/2) z around a checkpoint, each made when it is asked for.

    Args:
        model: the checkpoint, of which a copy is kept: the draws stay what they are where it is trained on.
        curvature: H by parameter name, as :func:`squared_gradients` gives it; copied as well.
        num_members: K.
        temperature: tau.
        prior_precision: lambda, above 0.
        seed: of z, which is drawn on the CPU: the same on every device.

    Raises:
        ValueError: numbers out of range; a curvature below zero, that is not a number, or of what the model has not.
    """

    def __init__(
        self,
        model: nn.Module,
        curvature: dict[str, Tensor],
        num_members: int,
        temperature: float = 1.0,
        prior_precision: float = 1.0,
        seed: int = 0,
    ) -> None:
        if num_members < 1:
            raise ValueError(f"num_members is {num_members}, expected at least one draw")
        if not prior_precision > 0:
            raise ValueError(
                f"prior_precision is {prior_precision}, expected a number above 0: where H is 0 it decides"
            )
        if not temperature >= 0:
            raise ValueError(f"temperature is {temperature}, expected 0 or more")
        for name, h in curvature.items():
            if not bool((h >= 0).all()):
                raise ValueError(
                    f"curvature of {name!r} is below zero or not a number in {int((~(h >= 0)).sum())} of {h.numel()} "
                    "elements, expected sums of squares; was a loss not finite?"
                )
        unknown = set(curvature) - dict(model.named_parameters()).keys()
        if unknown:
            raise ValueError(f"curvature names {sorted(unknown)[0]!r}, which the model has not")
        with torch.inference_mode(False):
            self._model, self._count = copy_of(model), num_members
            self._curvature = {name: h.detach().clone() for name, h in curvature.items()}
        self._temperature, self._prior, self._seed = temperature, prior_precision, seed

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, k: Any) -> Any:
        if isinstance(k, slice):
            return [self[i] for i in range(*k.indices(len(self)))]
        given, k = k, k + self._count if k < 0 else k
        if not 0 <= k < self._count:
            raise IndexError(f"draw {given} of {self._count}")
        with torch.inference_mode(False), torch.no_grad():
            member = copy_of(self._model)
            self._draw(member, torch.Generator().manual_seed(self._seed * 1_000_003 + k))
        return member

    def _draw(self, member: nn.Module, generator: torch.Generator) -> None:
        for name, parameter in member.named_parameters():
            h = self._curvature.get(name)
            if h is None:
                continue
            parts = _parts(parameter)
            if h.shape != parts.shape:
                raise ValueError(f"curvature of {name!r} is {list(h.shape)}, expected {list(parts.shape)}")
            z = torch.randn(parts.shape, generator=generator, dtype=torch.float32).to(h)
            parts.add_((self._temperature * (h + self._prior).rsqrt() * z).to(parts.dtype))

    def __iter__(self) -> Iterator[nn.Module]:
        return (self[k] for k in range(len(self)))


def laplace(
    model: nn.Module,
    loss: Loss,
    data: Iterable[Any],
    num_members: int,
    *,
    temperature: float = 1.0,
    prior_precision: float = 1.0,
    seed: int = 0,
    **options: Any,
) -> Ensemble:
    """Make an ensemble of K draws from the diagonal Laplace posterior around a checkpoint.

    The draws are theta + tau (H + lambda)^(-1/2) z: parameters that the data determine well move little. (The code of
    arXiv 2601.11444 has the exponent's sign the other way round.)

    Args:
        model: the checkpoint; left as it is.
        loss: see :func:`squared_gradients`.
        data: likewise.
        num_members: K.
        temperature: tau; 0 gives K copies of the checkpoint.
        prior_precision: lambda, above 0.
        seed: of the draws.
        **options: of :class:`fastens.Ensemble`.

    Returns:
        The ensemble.

    Raises:
        ValueError: as :func:`squared_gradients` and :class:`LaplaceMembers` say.
    """
    curvature = squared_gradients(model, loss, data)
    return Ensemble(LaplaceMembers(model, curvature, num_members, temperature, prior_precision, seed), **options)
