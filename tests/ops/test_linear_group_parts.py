"""Layers whose weights are some of the outputs of a larger stack, read where they are."""

import pytest
import torch

from fastens.ops.linear_group import linear_group
from tests.tolerances import OP, relative_error


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("biased", ["parts", "none", "apart"])
def test_parts_of_a_stack(rows, biased):
    pytest.importorskip("triton")
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(3, 24, 20, generator=generator), torch.randn(3, 24, generator=generator)
    x = torch.randn(3 * rows, 20, generator=generator)
    weights = [weight[:, :8], weight[:, 8:17], weight[:, 17:]]
    biases = [bias[:, :8], bias[:, 8:17], bias[:, 17:]]
    if biased == "none":
        biases = [None, None, None]
    elif biased == "apart":
        biases = [biases[0].contiguous(), None, biases[2].contiguous()]
    found = linear_group(x, weights, biases, backend="triton")
    expected = linear_group(x, [w.contiguous() for w in weights], biases, backend="reference")
    for ours, theirs in zip(found, expected, strict=True):
        assert relative_error(ours, theirs) < OP[torch.float32]
