"""M1: an evaluation takes the members' parameters, the packed copies that the report counts, and one folded pass."""

import pytest
import torch
from torch import nn

import fastens
from fastens import _native
from fastens.engine.arguments import Arguments
from fastens.engine.first import FirstPass
from fastens.engine.memory_cap import Allocations
from fastens.program import steps
from tests.networks import randomised

CHANNELS, MEMBERS, BATCH, SIZE = 32, 4, 2, 32
SLACK = 1.1  # what tables, patches of the input and small vectors add to the images


def members_and_input():
    def make():
        layers = [layer for _ in range(4) for layer in (nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.SiLU())]
        return nn.Sequential(nn.Conv2d(3, CHANNELS, 3, padding=1), *layers, nn.Conv2d(CHANNELS, 3, 3, padding=1))

    members = [randomised(make, seed) for seed in range(MEMBERS)]
    return members, torch.randn(BATCH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def num_bytes(module):
    return sum(p.numel() * p.element_size() for p in module.parameters())


ACTIVATIONS = 2 * MEMBERS * BATCH * CHANNELS * SIZE**2 * 4  # of one folded pass at its peak: in and out of a layer


def test_stacking_holds_the_parameters_once_and_one_member_more():
    members, _ = members_and_input()
    with Allocations() as allocations:
        ensemble = fastens.Ensemble(members)
    assert num_bytes(ensemble) == sum(num_bytes(member) for member in members)
    assert allocations.peak <= num_bytes(ensemble) + num_bytes(members[0])


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_an_evaluation_holds_one_folded_pass(backend, monkeypatch):
    """After the first call: outputs only, in a plan; else the activations of a pass. An audit adds one member's."""
    monkeypatch.setenv("FASTENS_AUDIT", "off")
    members, x = members_and_input()
    ensemble = fastens.Ensemble(members, backend=backend)
    with torch.no_grad():
        ensemble(x)
        with Allocations() as allocations:
            ensemble(x)
    outputs = (MEMBERS + 1) * x.numel() * 4
    if ensemble.report().plans:
        assert allocations.peak <= SLACK * outputs
    # the convolutions of K members are joined, so what a layer writes is held twice for a moment
    assert allocations.peak <= SLACK * (outputs + ACTIVATIONS * 3 / 2)


@pytest.mark.skipif(not _native.load(), reason=f"no compiled library: {_native.status()}")
def test_a_plan_holds_packed_copies_and_one_pass():
    members, x = members_and_input()
    ensemble = fastens.Ensemble(members)
    with torch.no_grad():
        ensemble(x)
    assert len(ensemble.report().plans) == 1
    assert ensemble._engine is not None
    (plan,) = [entry.plan for entry in ensemble._engine.plans.entries]
    convs = [step for step in plan.steps if isinstance(step, steps.Conv)]
    stacks = [p for p in ensemble.parameters() if p.ndim == 5]
    assert len(convs) == len(stacks)
    packed = 0
    for conv, stack in zip(convs, stacks, strict=True):
        members, out_channels, in_channels, *kernel = stack.shape
        assert kernel == [3, 3]
        taps = (conv.tile + 2) ** 2 if isinstance(conv, steps.Winograd) else 9
        assert taps <= 16  # for so few pixels no more
        padded = -(-out_channels // 16) * 16  # output channels are filled up to whole vectors
        packed += 4 * members * padded * (in_channels * taps + 1)  # and biases
    assert ensemble.report().plan_bytes <= packed + SLACK * ACTIVATIONS
    ensemble.refresh()
    assert ensemble.report().plan_bytes == 0


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_check_adds_no_more_than_one_folded_pass(backend):
    """The check alone, without the recording that keeps all activations of a pass."""
    members, x = members_and_input()
    ensemble = fastens.Ensemble(members, backend=backend, max_fold=MEMBERS * BATCH)
    engine = ensemble._engine
    assert engine is not None
    with torch.no_grad(), Allocations() as allocations:
        FirstPass(engine, Arguments((x,), {}, MEMBERS), "key", plannable=False, method="forward").run()
    outputs = 2 * MEMBERS * x.numel() * 4  # of the loop and of the fold
    assert allocations.peak <= SLACK * (outputs + 2 * ACTIVATIONS)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_rows_of_members_hold_one_pass_of_as_many_rows(backend, monkeypatch):
    """A batch of K B rows that have members holds what the rule's pass on B rows does, and not K times that."""
    monkeypatch.setenv("FASTENS_AUDIT", "off")
    members, x = members_and_input()
    ensemble = fastens.Ensemble(members, backend=backend)
    rows = x.repeat(MEMBERS, 1, 1, 1)
    with torch.no_grad(), ensemble.assigned(per_member=BATCH):
        ensemble(rows)
        plan_bytes = ensemble.report().plan_bytes
        with Allocations() as allocations:
            ensemble(rows)
    outputs = 2 * rows.numel() * 4
    assert allocations.peak <= SLACK * (outputs + ACTIVATIONS * 3 / 2)
    with torch.no_grad():
        ensemble.refresh()
        ensemble(x)
    assert plan_bytes <= SLACK * (ensemble.report().plan_bytes + outputs)
