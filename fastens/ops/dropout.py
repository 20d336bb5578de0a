"""Dropout whose mask is a function of member, layer, sample and element, not of a generator's state."""

import torch
from torch import Tensor

from fastens.device import on_gpu
from fastens.ops._dispatch import Op
from fastens.ops._rows import ACTIVATIONS, check_activation, check_masks, is_dense
from fastens.reference import dropout as reference


def _native_fake(x: Tensor, *_: object) -> Tensor:
    return _triton_fake(x) if on_gpu(x) else x.new_empty(x.shape)


def _triton_fake(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x) if is_dense(x) else x.new_empty(x.shape)


_dropout = Op(
    "dropout(Tensor x, Tensor members, Tensor? samples, float p, int key, int evaluation, "
    'str activation="none") -> Tensor',
    reference.dropout,
    {"native": _native_fake, "triton": _triton_fake},
)


def dropout(
    x: Tensor,
    members: Tensor,
    samples: Tensor | None,
    p: float,
    key: int,
    evaluation: int = 0,
    activation: str = "none",
    *,
    backend: str = "auto",
) -> Tensor:
    """Zero elements of act(x) with probability p and divide the others by 1 - p, by a mask that is the same everywhere.

    Args:
        x: [R, ...], floating point.
        members: int64 [R], the member of each row.
        samples: int64 [R], the sample of each row; none for masks that all samples and evaluations share.
        p: the probability that an element is dropped.
        key: 64 bits, of the seed and the layer.
        evaluation: which evaluation this is; without ``samples`` it has no effect.
        activation: ``"none"``, ``"silu"``, ``"gelu"`` or ``"gelu_tanh"``, before anything is dropped.
        backend: the code that runs it.

    Returns:
        [R, ...]; contiguous from the CPU's kernel, and in the layout of x from a GPU's.

    Raises:
        TypeError: ``x`` is not floating point.
        ValueError: p outside [0, 1], members or samples that are not one number per row, or an unknown activation.
    """
    if not x.is_floating_point():
        raise TypeError(f"dropout: x is {x.dtype}, expected a floating-point dtype")
    check_activation("dropout", activation, ACTIVATIONS)
    check_masks("dropout", x, p, members, samples)
    return _dropout.resolve(backend, (x,))(x, members, samples, p, key, evaluation, activation)


def has_kernel(x: Tensor) -> bool:
    """Whether ``backend="auto"`` drops elements of ``x`` by a kernel, and not by the reference's integer arithmetic."""
    return _dropout.resolve("auto", (x,)) is not torch.ops.fastens.dropout
