"""Member-batched linear layer, and the activation behind it."""

import math

from torch import Tensor

from fastens.ops._dispatch import Op
from fastens.ops._rows import ACTIVATIONS, check_activation, check_masks, check_rows, check_stack
from fastens.ops.dropout import dropout
from fastens.reference import linear as reference

# Beyond this many vectors per member the matrix product outweighs what fusing saves, and cuBLAS is taken. Not measured.
FUSED_ROWS = 64


def _fake(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1]))


_linear = Op(
    'linear(Tensor x, Tensor weight, Tensor? bias=None, Tensor? offsets=None, str activation="none", '
    "Tensor? members=None, Tensor? samples=None, float p=0., int key=0, int evaluation=0) -> Tensor",
    reference.linear,
    {"triton": _fake},
)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    offsets: Tensor | None = None,
    activation: str = "none",
    members: Tensor | None = None,
    samples: Tensor | None = None,
    p: float = 0.0,
    key: int = 0,
    evaluation: int = 0,
    *,
    backend: str = "auto",
) -> Tensor:
    """Apply each member's linear layer to its own rows: ``y[r] = act(x[r] @ weight[k].T + bias[k])``.

    Args:
        x: [R, ..., in], rows grouped by member.
        weight: [K, out, in].
        bias: [K, out], or none.
        offsets: int64 [K+1], the first row of each member's group and R; none for K equal groups.
        activation: ``"none"``, ``"silu"``, ``"gelu"`` or ``"gelu_tanh"``.
        members: int64 [R], the member of each row, by which its elements are dropped; none where none are.
        samples: int64 [R], the sample of each row, as in :func:`fastens.ops.dropout.dropout`.
        p: the probability that an element of the result is dropped.
        key: of the masks.
        evaluation: of fresh masks.
        backend: the code that runs it; ``"auto"`` leaves many rows to the library's matrix product.

    Returns:
        [R, ..., out].

    Raises:
        ValueError: rows that cannot be dealt out to the members, parameter shapes or dtypes that do not fit, or an
            unknown activation or backend.
        RuntimeError: a backend asked for by name that cannot run here.
    """
    check_masks("linear", x, p, members, samples)
    check_activation("linear", activation, ACTIVATIONS)
    if weight.ndim != 3:
        raise ValueError(f"linear: weight is {list(weight.shape)}, expected [members, out, in]")
    check_rows("linear", x, weight.shape[0], offsets)
    if x.shape[-1] != weight.shape[2]:
        raise ValueError(f"linear: x has {x.shape[-1]} features, weight expects {weight.shape[2]}")
    check_stack("linear", "bias", bias, (weight.shape[0], weight.shape[1]))
    tensors = [t for t in (x, weight, bias) if t is not None]
    rows = math.prod(x.shape[:-1])
    if backend == "auto" and isinstance(rows, int) and rows > FUSED_ROWS * weight.shape[0]:  # not a dynamic number
        backend = "reference"
        if members is not None and p:  # the mask in a pass of its own, which is a kernel
            y = _linear.default(x, weight, bias, offsets)
            return dropout(y, members, samples, p, key, evaluation, activation)
    return _linear.resolve(backend, tensors)(x, weight, bias, offsets, activation, members, samples, p, key, evaluation)
