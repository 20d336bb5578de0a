"""Dropout whose mask is a function of member, layer, sample and element, not of a generator's state."""

import torch
from torch import Tensor

from fastens.ops._dispatch import Op
from fastens.reference import dropout as reference

_dropout = Op(
    "dropout(Tensor x, Tensor members, Tensor? samples, float p, int key, int evaluation) -> Tensor",
    reference.dropout,
    {"native": lambda x, members, samples, p, key, evaluation: x.new_empty(x.shape)},
)


def dropout(
    x: Tensor,
    members: Tensor,
    samples: Tensor | None,
    p: float,
    key: int,
    evaluation: int = 0,
    *,
    backend: str = "auto",
) -> Tensor:
    """Zero elements with probability p and divide the others by 1 - p, by a mask that is the same on every device.

    Args:
        x: [R, ...], floating point.
        members: int64 [R], the member of each row.
        samples: int64 [R], the sample of each row; none for masks that all samples and evaluations share.
        p: the probability that an element is dropped.
        key: 64 bits, of the seed and the layer.
        evaluation: which evaluation this is; without ``samples`` it has no effect.
        backend: the code that runs it.

    Returns:
        [R, ...], contiguous where the native backend ran.

    Raises:
        TypeError: ``x`` is not floating point.
        ValueError: p outside [0, 1], or members or samples that are not one number per row.
    """
    if not x.is_floating_point():
        raise TypeError(f"dropout: x is {x.dtype}, expected a floating-point dtype")
    if not 0 <= p <= 1:
        raise ValueError(f"dropout: p is {p}, expected a probability")
    for name, numbers in (("members", members), ("samples", samples)):
        if numbers is None:
            continue
        if x.ndim == 0 or numbers.shape != x.shape[:1] or numbers.dtype != torch.int64:
            raise ValueError(
                f"dropout: {name} is {numbers.dtype} {list(numbers.shape)}, expected int64, one number for each row "
                f"of x {list(x.shape)}"
            )
    return _dropout.resolve(backend, (x,))(x, members, samples, p, key, evaluation)
