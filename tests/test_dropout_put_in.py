"""Masks after modules of the network were put in, moved or taken out: those of an ensemble that is made of it then."""

import copy
import warnings

import pytest
import torch
from torch import nn

import fastens
from tests.tolerances import relative_error

K = 3


class Net(nn.Module):
    """Dropouts in blocks, and one beside them."""

    def __init__(self):
        super().__init__()
        blocks = (nn.Sequential(nn.Linear(6, 6), nn.Dropout(p), nn.Tanh()) for p in (0.2, 0.4))
        self.blocks, self.drop, self.out = nn.ModuleList(blocks), nn.Dropout(0.3), nn.Linear(6, 6)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.out(self.drop(x))


def moved(network):
    network.blocks = nn.ModuleList(reversed(list(network.blocks)))


CHANGES = {
    "another dropout": lambda network: setattr(network, "drop", nn.Dropout(0.5)),
    "another inside": lambda network: network.blocks[0].__setitem__(1, nn.Dropout(0.6)),
    "one more": lambda network: network.blocks[1].append(nn.Dropout(0.5)),
    "moved": moved,
    "wrapped": lambda network: setattr(network, "drop", nn.Sequential(network.drop, nn.Dropout(0.25))),
    "taken out": lambda network: network.blocks[1].__delitem__(1),
}


@torch.no_grad()
@pytest.mark.parametrize("masks", ["fixed", "fresh"])
@pytest.mark.parametrize("calls", [0, 1, 3])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_masks_follow_the_modules(change, calls, masks):
    torch.manual_seed(0)
    network, x = Net(), torch.randn(4, 6)
    ensemble = fastens.MCDropout(copy.deepcopy(network), K, masks=masks)

    def outputs(of):
        with of.trajectory(4, generator=7):
            return of.member_outputs(x)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(calls):
            outputs(ensemble)
        for each in (ensemble.network, network):
            change(each)
        expected = outputs(fastens.MCDropout(network, K, masks=masks, engine="loop"))
        for _ in range(2):
            assert relative_error(outputs(ensemble), expected) < 1e-5
        if masks == "fixed":
            assert relative_error(torch.stack([member(x) for member in ensemble.members]), expected) < 1e-5
