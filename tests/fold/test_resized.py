"""Buffers that members give another shape in place: to each its own, beside which there is no other member's."""

import copy

import pytest
import torch
from torch import nn
from torch.ao.quantization import HistogramObserver, default_fake_quant, get_default_qat_qconfig, prepare_qat
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from tests.fold.contract import Held, batch, near

pytestmark = pytest.mark.filterwarnings("ignore:fastens", "ignore:torch.ao.quantization", "ignore:An output")


class Keeps(nn.Module):
    """Adds what it computed the last time, which it writes to a buffer in a way that is given."""

    def __init__(self, write):
        super().__init__()
        self.linear, self.write = nn.Linear(4, 4), write
        self.register_buffer("last", torch.zeros(1, 4))

    def forward(self, x):
        y = self.linear(x)
        found = y + self.last.mean(0)
        self.write(self.last, y.detach())
        return found


WRITES = {
    "resize": lambda last, y: last.resize_(y.shape).copy_(y),
    "resize as": lambda last, y: last.resize_as_(y).copy_(y),
    "detach and resize": lambda last, y: last.detach_().resize_(y.shape).copy_(y),
    "detach": lambda last, y: last.detach_().copy_(y[:1]),
    "out": lambda last, y: torch.mul(y, 2, out=last),
    "set": lambda last, y: last.set_(y.clone()),
}


@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_buffer_may_be_resized_in_place(write, engine):
    held = Held(lambda k: Keeps(write), engine=engine)
    for rows in (2, 2, 5, 3):
        held.sampling(batch(rows, 4), 2)
        for k, member in enumerate(held.members):
            near(held.ensemble.members[k].last, member.last)
    held.gradients(batch(3, 4))
    held.ensemble = copy.deepcopy(held.ensemble)
    held.sampling(batch(4, 4), 2)


class Checkpointed(nn.Module):
    """Reads a value of its own, and runs a layer again in the backward pass, which writes to buffers by ``out=``."""

    def __init__(self, reentrant):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.layer = parametrizations.spectral_norm(nn.Linear(4, 4))
        self.reentrant = reentrant

    def forward(self, x):
        x = self.first(x) * (1 if self.first.bias[0] > 0 else 2)
        return checkpoint(self.layer, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("engine", ["auto", "loop"])
def test_what_is_written_by_out_is_written_again_in_a_backward_pass(engine, reentrant):
    held = Held(lambda k: Checkpointed(reentrant), engine=engine)
    held.each(lambda member: member.train())
    for _ in range(3):
        held.gradients(batch(3, 4))
        for k, member in enumerate(held.members):
            near(dict(held.ensemble.members[k].named_buffers()), dict(member.named_buffers()))


def trained_quantised(k):
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)).train()
    network.qconfig = get_default_qat_qconfig("x86")
    return prepare_qat(network)


OBSERVED = {
    "quantisation-aware training": trained_quantised,
    "fake quantisation": lambda k: nn.Sequential(nn.Linear(4, 4), default_fake_quant(), nn.Linear(4, 4)),
    "histogram": lambda k: nn.Sequential(nn.Linear(4, 4), HistogramObserver()),
}


@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("make", OBSERVED.values(), ids=OBSERVED)
def test_observers_of_quantisation_observe_each_member(make, engine):
    held = Held(make, engine=engine)
    for factor in (1, 0.9, 0.9):
        with torch.no_grad():
            held.each(lambda module, factor=factor: [p.mul_(factor) for p in module.parameters()])
        held.sampling(batch(3, 4))
        for k, member in enumerate(held.members):
            near(dict(held.ensemble.members[k].named_buffers()), dict(member.named_buffers()))
