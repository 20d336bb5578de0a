"""Layer normalisation with each member's own scale and shift, and what a network does with the result."""

from collections.abc import Sequence

from torch import Tensor

from fastens.ops._dispatch import Op
from fastens.ops._rows import check_activation, check_masks, check_rows, check_stack
from fastens.reference import layer_norm as reference


def _fake(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


_layer_norm = Op(
    "layer_norm(Tensor x, SymInt[] normalized_shape, Tensor? weight=None, Tensor? bias=None, float eps=1e-05, "
    'Tensor? offsets=None, Tensor? scale=None, Tensor? shift=None, str activation="none", '
    "Tensor? members=None, Tensor? samples=None, float p=0., int key=0, int evaluation=0) -> Tensor",
    reference.layer_norm,
    {"triton": _fake},
)


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    offsets: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str = "none",
    members: Tensor | None = None,
    samples: Tensor | None = None,
    p: float = 0.0,
    key: int = 0,
    evaluation: int = 0,
    *,
    backend: str = "auto",
) -> Tensor:
    """Normalise over the last dimensions, then scale and shift by the row's member (Ba et al., arXiv 1607.06450).

    ``act((norm(x) * weight + bias) * (1 + scale) + shift)``, with the scale and shift of each row as in DiT (arXiv
    2212.09748).

    Args:
        x: [R, ..., *normalized_shape], rows grouped by member.
        normalized_shape: the trailing dimensions that are normalised together.
        weight: [K, *normalized_shape], or none.
        bias: [K, *normalized_shape], or none.
        eps: added to the variance.
        offsets: int64 [K+1], the first row of each member's group and R; none for K equal groups.
        scale: [R, *normalized_shape], or none.
        shift: [R, *normalized_shape], or none.
        activation: ``"none"`` or ``"silu"``.
        members: int64 [R], the member of each row, by which its elements are dropped; none where none are.
        samples: int64 [R], the sample of each row, as in :func:`fastens.ops.dropout.dropout`.
        p: the probability that an element of the result is dropped.
        key: of the masks.
        evaluation: of fresh masks.
        backend: the code that runs it.

    Returns:
        [R, ..., *normalized_shape].

    Raises:
        ValueError: rows that cannot be dealt out to the members, parameter shapes or dtypes that do not fit, or an
            unknown activation or backend.
        RuntimeError: a backend asked for by name that cannot run here.
    """
    check_masks("layer_norm", x, p, members, samples)
    check_activation("layer_norm", activation, ("none", "silu"))
    for name, stack in (("weight", weight), ("bias", bias)):
        if stack is not None:
            check_rows("layer_norm", x, stack.shape[0], offsets)
            check_stack("layer_norm", name, stack, (stack.shape[0], *normalized_shape))
    if scale is not None or shift is not None:
        if x.ndim <= len(normalized_shape) or tuple(x.shape[x.ndim - len(normalized_shape) :]) != tuple(
            normalized_shape
        ):
            raise ValueError(f"layer_norm: x is {list(x.shape)}, expected [R, ...] ending in {list(normalized_shape)}")
        for name, tensor in (("scale", scale), ("shift", shift)):
            check_stack("layer_norm", name, tensor, (x.shape[0], *normalized_shape), "rows first")
    tensors = [t for t in (x, weight, bias, scale, shift) if t is not None]
    return _layer_norm.resolve(backend, tensors)(
        x, normalized_shape, weight, bias, eps, offsets, scale, shift, activation, members, samples, p, key, evaluation
    )
