"""Member-batched linear layers that read the same vectors, in one launch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastens.kernels._into import merged
from fastens.ops._dispatch import Op
from fastens.ops._rows import ACTIVATIONS, check_activation, check_rows, check_stack
from fastens.reference import linear_group as reference


def _fake(x: Tensor, weights: list[Tensor], *_: object) -> list[Tensor]:
    return [x.new_empty((*x.shape[:-1], weight.shape[1]), dtype=weight.dtype) for weight in weights]


_linear_group = Op(
    'linear_group(Tensor x, Tensor[] weights, Tensor[] biases, int[] biased, str activation="none") -> Tensor[]',
    reference.linear_group,
    {"triton": _fake},
)


def linear_group(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activation: str = "none",
    *,
    backend: str = "auto",
    into: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Apply N linear layers of each member to its own rows: ``y_i[r] = act(x[r] @ weights[i][k].T + biases[i][k])``.

    As a score network does with the embedding of the noise level, which every residual block projects for itself.

    Args:
        x: [R, ..., C], rows grouped by member, as many for each.
        weights: N stacks [K, O_i, C]; they are not copied where each member's is contiguous.
        biases: N stacks [K, O_i], or none for a layer without.
        activation: ``"none"``, ``"silu"``, ``"gelu"`` or ``"gelu_tanh"``, behind each layer.
        backend: the code that runs it.
        into: N tensors [R, ..., O_i] to write the results to, without a copy where their vectors are contiguous and
            equally far apart; none for memory of their own. No derivative goes through them.

    Returns:
        N tensors [R, ..., O_i], which are ``into`` where it is given.

    Raises:
        ValueError: no layers, rows that cannot be dealt out to the members, shapes that do not fit, or an unknown
            activation or backend.
        RuntimeError: a backend asked for by name that cannot run here.
    """
    weights, biases = list(weights), list(biases)
    if not weights or len(weights) != len(biases):
        raise ValueError(f"linear_group: {len(weights)} weights and {len(biases)} biases, expected one for each layer")
    check_activation("linear_group", activation, ACTIVATIONS)
    num_members = weights[0].shape[0]
    check_rows("linear_group", x, num_members, None)
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        if weight.ndim != 3 or weight.shape[0] != num_members or weight.shape[2] != x.shape[-1]:
            raise ValueError(
                f"linear_group: weights[{i}] is {list(weight.shape)}, expected [{num_members}, out, {x.shape[-1]}]"
            )
        check_stack("linear_group", f"biases[{i}]", bias, (num_members, weight.shape[1]))
    biased = [i for i, bias in enumerate(biases) if bias is not None]
    given = [bias for bias in biases if bias is not None]
    run = _linear_group.resolve(backend, [x, *weights, *given])
    fused = run is not torch.ops.fastens.linear_group
    if not fused:  # itself, since torch.func.vmap takes no op that returns a list
        run = reference.linear_group
    if into is None:
        return run(x, weights, given, biased, activation)
    for i, (out, weight) in enumerate(zip(into, weights, strict=True)):
        expected = (*x.shape[:-1], weight.shape[1])
        if tuple(out.shape) != expected:
            raise ValueError(f"linear_group: into[{i}] is {list(out.shape)}, expected {list(expected)}")
    direct = all(merged(out.shape[:-1], out.stride()[:-1]) is not None and out.stride(-1) == 1 for out in into)
    if fused and direct:
        from fastens.kernels.linear_group import linear_group as launch

        return launch(x, weights, given, biased, activation, list(into))
    for out, y in zip(into, run(x, weights, given, biased, activation), strict=True):
        out.copy_(y)
    return list(into)
