"""Averages as the libraries that keep them save them."""

import copy

import pytest
import torch
from torch import nn

from tests.io.test_layouts import assert_same, load


def average_by_a_library(kind, net, steps=3):
    """An average of ``net`` under some updates by the library itself: what it saves, and its network."""
    if kind == "torch":
        average = torch.optim.swa_utils.AveragedModel(net, use_buffers=True)
        step, network = lambda: average.update_parameters(net), average.module
    elif kind == "ema-pytorch":
        average = pytest.importorskip("ema_pytorch").EMA(net, beta=0.9, update_after_step=0, update_every=1)
        step, network = average.update, average.ema_model
    else:
        average = pytest.importorskip("diffusers.training_utils").EMAModel(net.parameters())
        step, network = lambda: average.step(net.parameters()), copy.deepcopy(net)
    for k in range(steps):
        with torch.no_grad():
            for p in net.parameters():
                p += 0.1 * (k + 1)
        step()
    if kind == "diffusers":
        average.copy_to(network.parameters())
    return average.state_dict(), network


@pytest.mark.parametrize("kind", ["torch", "ema-pytorch", "diffusers"])
@pytest.mark.parametrize("beside", [True, False])
def test_averages_as_the_libraries_themselves_save_them(kind, beside, tmp_path):
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 5))
    saved, expected = average_by_a_library(kind, net)
    content = {"model": net.state_dict(), "ema": saved} if beside else saved
    factory = lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 5))  # noqa: E731
    assert not torch.equal(expected[0].weight, net[0].weight)
    assert_same(load(content, tmp_path / "a.pt", factory), expected)
    if beside:
        assert_same(load(content, tmp_path / "a.pt", factory, ema=False), net)
