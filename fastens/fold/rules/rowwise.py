"""Functions that treat every entry of dimension 0 alone: the hidden dimension is folded into it."""

from typing import Any

import torch
from torch import Tensor

from fastens.fold.dispatch import AS_STEPS, Fold, rule, run_common
from fastens.fold.names import named
from fastens.fold.nested import mapped, plain
from fastens.fold.tensor import member_valued

# function: dimensions of a batched input
_POOLS = {
    f"{kind}{n}d": n + 2
    for n in (1, 2, 3)
    for kind in ("avg_pool", "max_pool", "adaptive_avg_pool", "adaptive_max_pool", "lp_pool")
}
_IMAGES = {
    **_POOLS, "pixel_shuffle": 4, "pixel_unshuffle": 4, "channel_shuffle": 4, "unfold": 4, "fold": 3,
    "local_response_norm": None, "interpolate": None, "upsample": None, "upsample_nearest": None,
    "upsample_bilinear": None, "grid_sample": None, "upsample_nearest1d": None,
    "upsample_nearest2d": None, "upsample_nearest3d": None, "upsample_bilinear2d": None, "upsample_bicubic2d": None,
    "upsample_linear1d": None, "upsample_trilinear3d": None, "_adaptive_avg_pool2d": 4, "max_pool2d_with_indices": 4,
}  # fmt: skip


@rule(*(f for name in _IMAGES for f in named(name) if f is not Tensor.unfold))
def rowwise(fold: Fold, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Fold, run, unfold."""
    name = func.__name__
    tensors: list[Tensor] = []
    mapped(lambda x: tensors.append(x) or x, (args, kwargs))
    ndim = _IMAGES.get(name.removeprefix("_") if name not in _IMAGES else name)
    x = tensors[0]
    if ndim is not None and x.ndim != ndim:
        return NotImplemented  # an input without batch
    if any(t.ndim < 2 or t.shape[0] != x.shape[0] for t in tensors):
        return NotImplemented
    found = func(*mapped(fold.rows, args), **mapped(fold.rows, kwargs))
    return fold.unrows(found) if isinstance(found, Tensor) else type(found)(map(fold.unrows, found))


@rule(*named("affine_grid"))
def affine_grid(fold: Fold, func: Any, theta: Any, size: Any, *args: Any, **kwargs: Any) -> Any:
    """Places to sample at, of images whose number is said."""
    if theta.ndim != 3 or len(size) < 4 or size[0] != theta.shape[0]:
        return NotImplemented  # torch's own error
    return fold.unrows(func(fold.rows(theta), [fold.hidden.size * size[0], *size[1:]], *args, **kwargs))


@rule(*named("one_hot"))
def one_hot(fold: Fold, func: Any, x: Any, num_classes: int = -1) -> Any:
    """Classes as unit vectors; how many there are must be said."""
    if num_classes < 1 or not member_valued(x):
        return NotImplemented
    return fold.wrap(_unit_vectors(fold.stack(x), num_classes) if fold.recording else func(fold.stack(x), num_classes))


def _unit_vectors(classes: Tensor, num_classes: int) -> Tensor:
    """What ``one_hot`` makes, by an operation that checks the classes itself: torch's has Python read them for that."""
    zeros = torch.zeros(*classes.shape, num_classes, dtype=torch.int64, device=classes.device)
    return zeros.scatter(-1, classes.unsqueeze(-1), 1)


def _one_hot_of_all(fold: Fold, func: Any, x: Any, num_classes: int = -1) -> Any:
    """The same of classes that all members share, while a pass is recorded."""
    if num_classes < 1:
        return run_common(fold, func, (x, num_classes), {}, True)
    return fold.common(_unit_vectors(plain(x), num_classes))


AS_STEPS.update(dict.fromkeys(named("one_hot"), _one_hot_of_all))


@rule(*named("tril triu"))
def triangle(fold: Fold, func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """A triangle of the last two dimensions."""
    return fold.wrap(func(fold.stack(x), *args, **kwargs)) if x.ndim > 1 else NotImplemented


@rule(*named("fft.fft fft.ifft fft.rfft fft.irfft fft.fft2 fft.ifft2 fft.rfft2 fft.irfft2"))
def fourier(fold: Fold, func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Transforms of the last dimensions; of others entry by entry."""
    least = 2 if func.__name__.endswith("2") else 1
    if args or set(kwargs) - {"norm", "n", "s"} or x.ndim < least or isinstance(func, type(torch)):
        return NotImplemented
    return fold.wrap(func(fold.stack(x), **kwargs))
