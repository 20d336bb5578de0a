"""Nested tensors: taken where members pad what they return, and where not, an error that says so."""

import pytest
import torch
from torch import nn

import fastens
from tests.fold.contract import averaged, made, near


class Net(nn.Module):
    """Takes sequences of different lengths."""

    def __init__(self, pads):
        super().__init__()
        self.layer, self.pads = nn.Linear(4, 4), pads

    def forward(self, x):
        """[B, lengths, 4] -> the same, nested or padded."""
        h = self.layer(x)
        return torch.nested.to_padded_tensor(h, 0.0) if self.pads else h


def sequences(layout):
    return torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(3, 4)], layout=layout)


@pytest.mark.filterwarnings("ignore:fastens", "ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("engine", ["auto", "loop"])
class TestSequences:
    """Of two and three entries."""

    def test_padded_outputs_are_combined(self, engine, grad):
        members = [made(lambda _: Net(pads=True), k) for k in range(2)]
        ensemble, x = fastens.Ensemble(members, engine=engine), sequences(torch.jagged)
        with torch.set_grad_enabled(grad):
            near(ensemble(x), averaged([member(x) for member in members]))

    def test_nested_outputs_are_refused(self, engine, grad):
        ensemble = fastens.Ensemble([made(lambda _: Net(pads=False), k) for k in range(2)], engine=engine)
        with torch.set_grad_enabled(grad), pytest.raises(TypeError, match=r"let them return torch.nested.to_padded"):
            ensemble(sequences(torch.jagged))

    def test_arguments_without_a_shape_are_refused(self, engine, grad):
        ensemble = fastens.Ensemble([made(lambda _: Net(pads=True), k) for k in range(2)], engine=engine)
        with torch.set_grad_enabled(grad), pytest.raises(TypeError, match=r"make it with layout=torch.jagged"):
            ensemble(sequences(torch.strided))
