"""P1: what it costs to know that a plan is true: the guards of a call, and the audits of a thousand calls."""

import pytest
import torch

import fastens
from bench.bench_forward import NETWORKS, K
from bench.contest import contest
from fastens.engine.calls import PlannedCall

CALLS = 1000 // 9  # for each audit of a thousand: those at calls 2, 4, ..., 512


def planned_call(goal: str, batch: int):
    """An ensemble that has a plan, and the arguments of a call of it."""
    network = NETWORKS[goal]
    x = torch.randn(batch, network.channels, network.size, network.size, generator=torch.Generator().manual_seed(0))
    ensemble, t = fastens.Ensemble(network.members(K)), torch.full((batch,), 500)
    for _ in range(2):
        ensemble(x, t)
    assert ensemble.report().plans
    return ensemble, x, t


@pytest.mark.parametrize("in_succession", [1, 20], ids=["behind a call", "in succession"])
@pytest.mark.parametrize("goal", ["C2", "C3"])
@torch.no_grad()
def test_guards(benchmark, goal, in_succession, monkeypatch):
    """All that a planned call asks before its program runs: signature, aliasing, context, hooks, state and weights.

    Behind a call, what the guards look at is no longer in the nearest caches, as it is one guard after another.
    """
    monkeypatch.setenv("FASTENS_AUDIT", "off")
    ensemble, x, t = planned_call(goal, 1)
    engine, expected = ensemble._engine, ensemble(x, t).sample

    def guards():
        arguments = ensemble._arguments((x, t), {})
        assert engine.can_plan(arguments)
        assert engine.plans.current(PlannedCall(engine, arguments).key) is not None
        return expected

    contest(
        benchmark,
        guards,
        {"the call": lambda: ensemble(x, t).sample},
        expected,
        1e-4,
        "P1",
        f"guards of a planned call ({goal}), {'one after another' if in_succession > 1 else 'each behind a call'}",
        f"K={K}, B=1, {goal}'s network, {len(engine.plans.guards.tensors)} tensors, float32",
        {"the call": 100},
        rounds=40,
        in_succession=in_succession,
    )


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("goal", ["C2", "C3"])
@torch.no_grad()
def test_audits(benchmark, goal, batch, monkeypatch):
    """An audit beside the calls that there are for each of a thousand; it is a member's own forward, whatever K is."""
    monkeypatch.setenv("FASTENS_AUDIT", "off")
    ensemble, x, t = planned_call(goal, batch)
    engine, expected = ensemble._engine, ensemble(x, t).sample
    call = PlannedCall(engine, ensemble._arguments((x, t), {}))
    entry, leaves = engine.plans.current(call.key), call.run()

    def audit():
        assert call._holds(entry, leaves)
        return expected

    def calls():
        for _ in range(CALLS):
            output = ensemble(x, t).sample
        return output

    contest(
        benchmark,
        audit,
        {"the calls": calls},
        expected,
        1e-4,
        "P1",
        f"an audit beside {CALLS} calls ({goal}), batch {batch}",
        f"K={K}, B={batch}, {goal}'s network, float32",
        {"the calls": 100},
        rounds=3,
        warmup_rounds=0,
    )
