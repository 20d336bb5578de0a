"""Transposed convolutions are steps: planned ensembles against their members, on every instruction set."""

import pytest
import torch
from torch import nn

import fastens
from fastens import _native
from fastens.ops.run_program import available, forced_target, targets
from tests.tolerances import NETWORK, relative_error

pytestmark = pytest.mark.skipif(not available(), reason=f"no compiled library: {_native.status()}")
K = 3
LAYERS = {1: (nn.Conv1d, nn.ConvTranspose1d), 2: (nn.Conv2d, nn.ConvTranspose2d)}
SETTINGS = [  # kernel, stride, padding, output padding
    (1, 1, 0, 0),
    (1, 3, 0, 2),
    (2, 2, 0, 0),
    (3, 1, 2, 0),
    (3, 2, 1, 1),
    (4, 2, 1, 0),
    (5, 3, 2, 1),
    (2, 3, 1, 0),
]


def planned_error(members, x):
    """Largest relative error of a plan's second run, and that nothing in it was left to torch."""
    ensemble = fastens.Ensemble(members)
    with torch.no_grad():
        ensemble.member_outputs(x * 0.5)
        outputs, expected = ensemble.member_outputs(x), torch.stack([member(x) for member in members])
    (kinds,) = ensemble._engine.plans.kinds
    assert not any(name.startswith(("fastens", "aten")) for name in kinds), kinds
    return relative_error(outputs, expected)


@pytest.mark.parametrize("target", targets())
@pytest.mark.parametrize("space", LAYERS)
def test_equals_the_members(space, target):
    torch.manual_seed(0)
    plain, transposed = LAYERS[space]
    try:
        with forced_target(target):
            for kernel, stride, padding, more in SETTINGS:
                layer = (transposed, 7, 20, kernel, stride, padding, more)
                members = [
                    nn.Sequential(plain(2, 7, 1), nn.SiLU(), layer[0](*layer[1:]), nn.SiLU()).eval() for _ in range(K)
                ]
                assert planned_error(members, torch.randn(2, 2, *(7, 5)[:space])) <= NETWORK[torch.float32]
    except RuntimeError as error:
        if "this processor has no" not in str(error) and "is no target" not in str(error):
            raise
        pytest.skip(str(error))


class UpBlock(nn.Module):
    """What surrounds a transposed convolution in a U-Net: a norm and an activation before it, a skip joined behind."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(11, 3, 3, padding=1)
        self.norm, self.up = nn.GroupNorm(4, 8), nn.ConvTranspose2d(8, 8, 4, 2, 1, bias=False)

    def forward(self, x):
        h = self.up(nn.functional.silu(self.norm(self.inner(x))))
        return self.outer(torch.cat([h, x], 1))


@pytest.mark.parametrize("batch", [1, 4])
def test_within_a_network(batch):
    torch.manual_seed(0)
    members = [UpBlock().eval() for _ in range(K)]
    assert planned_error(members, torch.randn(batch, 3, 8, 6)) <= NETWORK[torch.float32]


def test_each_row_its_own_member():
    torch.manual_seed(0)
    members = [UpBlock().eval() for _ in range(K)]
    ensemble, x = fastens.Ensemble(members, "alternating"), torch.randn(5, 3, 8, 6)
    with torch.no_grad():
        for _ in range(3):
            one = ensemble(x)
            expected = torch.stack([member(x) for member in members])
            assert ((one - expected).abs().amax((2, 3, 4)).amin(0) <= 1e-5).all()
