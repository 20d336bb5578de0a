"""What random rules cost beside one member, and MC Dropout beside a Deep Ensemble, on the networks of C2 and C3."""

import pytest
import torch

import fastens
from bench.bench_forward import K, digits_members, small_members
from bench.contest import contest
from fastens.demo.train import MODEL

NETWORKS = {"C2": (digits_members, 1, MODEL["sample_size"]), "C3": (small_members, 3, 16)}


def contest_of(benchmark, goal, batch, ours, rivals, expected, question, wanted):
    contest(
        benchmark,
        ours,
        rivals,
        expected,
        1e-4,
        goal,
        f"{question} ({goal}), batch {batch}",
        f"K={K}, B={batch}, {goal}'s network, float32",
        wanted,
        rounds=15,
    )


@pytest.mark.parametrize("goal", NETWORKS)
@pytest.mark.parametrize("rule", ["alternating", "mixture"])
@pytest.mark.parametrize("batch", [1, 16])
def test_random_rules(benchmark, goal, rule, batch):
    """Each sample goes to one member, so the cost should be that of one: eager, and planned as an ensemble of one.

    The members have equal weights, in K places, so that whichever is drawn the result is known.
    """
    make, channels, size = NETWORKS[goal]
    member = make()[0]
    x = torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(0))
    t = torch.full((batch,), 500)
    ensemble, alone = fastens.Ensemble([member] * K, rule), fastens.Ensemble([member])
    rivals = {"one member": lambda: member(x, t).sample, "one member, planned": lambda: alone(x, t).sample}
    with torch.no_grad(), ensemble.trajectory(batch, generator=0):
        contest_of(
            benchmark,
            goal,
            batch,
            lambda: ensemble(x, t).sample,
            rivals,
            member(x, t).sample,
            f"{rule} beside one member",
            {"one member": 1 / 1.3},
        )
    assert ensemble.report().plans


@pytest.mark.parametrize("goal", NETWORKS)
@pytest.mark.parametrize("masks", ["fixed", "fresh"])
@pytest.mark.parametrize("batch", [1, 16])
def test_mc_dropout(benchmark, goal, masks, batch):
    """K masks on one set of weights beside K sets of weights, both in one pass."""
    make, channels, size = NETWORKS[goal]
    members = make()
    x = torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(0))
    t = torch.full((batch,), 500)
    dropout = fastens.MCDropout(members[0], K, masks=masks, p=0.1)
    deep = fastens.Ensemble(members)

    def ours():
        with dropout.trajectory(batch, generator=0):
            return dropout(x, t).sample

    with torch.no_grad():
        looped = fastens.MCDropout(members[0], K, masks=masks, p=0.1, engine="loop")
        with looped.trajectory(batch, generator=0):
            expected = looped(x, t).sample.double()
        average = torch.stack([member(x, t).sample for member in members]).mean(0)
        assert (deep(x, t).sample - average).abs().max() <= 1e-4 * average.abs().max()
        rivals = {"deep ensemble": lambda: (deep(x, t), expected)[1]}  # its own result was just checked
        contest_of(benchmark, goal, batch, ours, rivals, expected, f"MC Dropout, {masks} masks", {"deep ensemble": 1.0})
