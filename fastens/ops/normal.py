"""Gaussian noise from counters: each sample has its own stream, the same on every device."""

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from fastens.ops._dispatch import Op
from fastens.reference import normal as reference


def _fake(seed: Tensor, offset: Tensor, samples: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty((samples.shape[0], *shape), dtype=torch.float32, device=samples.device)


_normal = Op(
    "normal(Tensor seed, Tensor offset, Tensor samples, SymInt[] shape) -> Tensor",
    lambda seed, offset, samples, shape: reference.normal(seed, offset, samples, tuple(shape)),
    {"triton": _fake},
)


def normal(
    seed: int | Tensor, offset: int | Tensor, samples: Tensor, shape: Sequence[int], *, backend: str = "auto"
) -> Tensor:
    """Draw standard normal noise for numbered samples.

    Element j of sample i is a function of (seed, offset, i, j) alone: not of its batch-mates, the batch size or the
    backend, up to the last bit. Philox4x32-10 with counter ``(j // 4, offset, i)``, and Box and Muller's transform of
    its four words.

    Args:
        seed: 64 bits; or int64 [] that holds them, so that a recorded graph can read others.
        offset: which draw of a sample this is, e.g. the sampler's step, 32 bits; one, or one per sample, int64 [B].
        samples: numbers of the samples, int64 [B], none negative.
        shape: of one sample.
        backend: the code that runs it.

    Returns:
        float32 [B, *shape] on the device of ``samples``.

    Raises:
        ValueError: numbers or offsets that are not int64 of those shapes, or an unknown backend.
    """
    if samples.ndim != 1 or samples.dtype != torch.int64:
        raise ValueError(f"normal: samples is {samples.dtype} {list(samples.shape)}, expected int64 [B]")
    seed, offset = (number_on(x, samples.device) for x in (seed, offset))
    check_offset("normal", offset, samples)
    return _normal.resolve(backend, (samples.new_empty(0, dtype=torch.float32),))(seed, offset, samples, list(shape))


def check_offset(op: str, offset: Tensor, samples: Tensor) -> None:
    """Raise unless there is one draw, or one of each sample."""
    if offset.dtype != torch.int64 or tuple(offset.shape) not in ((), (1,), tuple(samples.shape)):
        raise ValueError(
            f"{op}: offset is {offset.dtype} {list(offset.shape)}, expected int64, one or [{len(samples)}]"
        )


def number_on(x: int | Tensor, device: torch.device) -> Tensor:
    """A number's 64 bits as int64 [] on a device; a tensor as it is."""
    if isinstance(x, Tensor):
        return x
    x = operator.index(x) & 0xFFFFFFFFFFFFFFFF
    return torch.full((), x - (1 << 64) if x >> 63 else x, dtype=torch.int64, device=device)
