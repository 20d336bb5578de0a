"""Which convolutions of a plan run in Winograd's squares, and that they give what the members give."""

import dataclasses
import itertools

import pytest
import torch
from torch import nn

import fastens
from fastens import _native
from fastens.ops.run_program import available
from fastens.plan.cpu.tiling import Shape, tile
from fastens.plan.cpu.winograd import cost, squares_of
from fastens.program.winograd import TILES
from tests.networks import randomised
from tests.tolerances import NETWORK, relative_error

pytestmark = pytest.mark.skipif(not available(), reason=f"no compiled library: {_native.status()}")


def convolved(batch, size, channels=64, out_channels=64, kernel=(3, 3), stride=(1, 1), members=5, given=False):
    run = 1 if given else batch
    return Shape(members * batch, size, size, channels, out_channels, kernel, stride, members, run, given)


@pytest.mark.parametrize(
    ("batch", "size", "channels", "squares"),
    [
        (1, 16, 64, 2),
        (16, 16, 64, 4),
        (1, 8, 256, 0),  # reading the weights is what takes the time
        (4, 8, 256, 2),
        (1, 32, 256, 2),
        (4, 32, 256, 4),
        (16, 32, 3, 0),  # the transforms would
        (1, 4, 64, 0),  # too few squares to fill a tile of a product
    ],
)
def test_the_choice(batch, size, channels, squares):
    assert squares_of(convolved(batch, size, channels, channels), 2) == squares


@pytest.mark.parametrize("shape", [{"kernel": (1, 1)}, {"kernel": (5, 5)}, {"kernel": (1, 3)}, {"stride": (2, 2)}])
def test_other_convolutions_are_direct(shape):
    assert squares_of(convolved(64, 32, **shape), 2) == 0


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 6, 8, 16, 64])
@pytest.mark.parametrize("size", [4, 16, 64])
def test_rows_whose_members_are_given_run_as_those_of_members_in_turn(batch, size):
    """As many rows of each cost the same, so that both are cut into the same pieces."""
    in_turn, given = convolved(batch, size), convolved(batch, size, given=True)
    squares = squares_of(in_turn, 2)
    assert squares_of(given, 2) == squares
    ours, theirs = tile(given, 2, squares), tile(in_turn, 2, squares)
    assert dataclasses.replace(ours, tasks=theirs.tasks) == theirs
    assert ours.tasks >= theirs.tasks


@pytest.mark.parametrize("squares", [0, *TILES])
def test_more_rows_cost_more_and_each_less(squares):
    costs = [cost(convolved(batch, 16), squares, 2) for batch in (1, 4, 16, 64)]
    assert all(a < b <= 4 * a for a, b in itertools.pairwise(costs))


def members_of(count, channels):
    def make():
        return nn.Sequential(
            nn.Conv2d(3, channels, 3, padding=1),
            nn.GroupNorm(4, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.Conv2d(channels, channels, 3, stride=2, padding=1),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    return [randomised(make, seed) for seed in range(count)]


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("size", [(16, 16), (18, 22)])
@pytest.mark.parametrize("batch", [1, 3, 16])
def test_a_network(count, size, batch):
    members = members_of(count, 64)
    ensemble = fastens.Ensemble(members, engine="fold")
    x = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = torch.stack([member(x) for member in members])
        for _ in range(2):
            assert relative_error(ensemble.member_outputs(x), expected) < NETWORK[torch.float32]
    assert ensemble.report().plans[0]["Winograd"] == 2
    assert "2 Winograd" in str(ensemble.report())


def test_products_of_bfloat16_are_direct():
    members = [member.bfloat16() for member in members_of(2, 64)]
    ensemble = fastens.Ensemble(members, engine="fold")
    with torch.no_grad():
        ensemble(torch.randn(4, 3, 16, 16).bfloat16())
    (plan,) = ensemble.report().plans
    assert ("Winograd" in plan) == (ensemble.report().target != "avx512_bf16")
