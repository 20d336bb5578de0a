"""Member-batched linear layers that read the same vectors, naively."""

from torch import Tensor

from fastens.reference.linear import linear


def linear_group(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], biased: list[int], activation: str = "none"
) -> list[Tensor]:
    """Each layer by itself; ``biases`` are those of the layers ``biased``.

    Shapes as in :func:`fastens.ops.linear_group.linear_group`.
    """
    of_layer = dict(zip(biased, biases, strict=True))
    return [linear(x, weight, of_layer.get(i), None, activation) for i, weight in enumerate(weights)]
