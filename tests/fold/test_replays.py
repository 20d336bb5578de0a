"""Launches of a plan that are replayed as graphs: on the CPU code that runs again stands for a graph."""

import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fastens
from fastens import tune
from fastens.device import device_of
from fastens.engine import planned
from fastens.kernels import _graph
from fastens.plan.gpu import replay
from tests.fold.test_launches import plan_of
from tests.fold.test_plans import members_of
from tests.tolerances import NETWORK, relative_error

MANY = replay.AFTER + 3


@pytest.fixture
def log(monkeypatch):
    """What is recorded and replayed, in order; a replay runs again, and writes what the recording returned."""
    events = []

    def record(launch, device, warm_up):
        for _ in range(warm_up):
            launch()
        outputs = launch()
        events.append("record")

        def again():
            events.append("replay")
            for kept, new in zip(outputs, launch(), strict=True):
                kept.copy_(new)

        return again, outputs

    monkeypatch.setattr(planned, "launches_on", lambda _: True)
    monkeypatch.setattr(_graph, "record_graph", record)
    replays = replay.Replays.__init__
    monkeypatch.setattr(replay.Replays, "__init__", lambda self, _, size: replays(self, torch.device("cuda"), size))
    return events


class Passing(TorchDispatchMode):
    """Sees every launch, and would see none of a graph."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def unet(rule="mean"):
    members, arguments = members_of("unet_2d", 2)
    return fastens.Ensemble(members, rule, engine="fold"), members, arguments


@pytest.mark.parametrize("rule", ["mean", "median"])
@torch.no_grad()
def test_every_call_has_its_own_result(log, rule):
    ensemble, members, arguments = unet(rule)
    (x, *rest), _ = arguments(2)
    results, expected = [], []
    for i in range(MANY):
        results.append(ensemble((1 + i / 4) * x, *rest).sample)
        expected.append(torch.stack([member((1 + i / 4) * x, *rest).sample for member in members]))
    assert log[0] == "record"
    assert log[1:] == ["replay"] * (len(log) - 1)
    assert len(log) > 2
    for found, stack in zip(results, expected, strict=True):
        assert relative_error(found, fastens.aggregate(stack, rule)) < NETWORK[torch.float32]
    report = ensemble.report()
    assert report.graphs == 1
    assert "1 CUDA graphs replay" in str(report)


@torch.no_grad()
def test_sums_by_other_weights_are_other_graphs(log):
    ensemble, members, arguments = unet()
    args, _ = arguments(2)
    stack = torch.stack([member(*args).sample for member in members])
    for i in range(replay.MOST + 2):
        rule = fastens.rules.Mean(weights=[1.0 - i / 8, i / 8])
        ensemble.rule = rule
        for _ in range(MANY):
            assert relative_error(ensemble(*args).sample, fastens.aggregate(stack, rule)) < NETWORK[torch.float32]
    assert log.count("record") == replay.MOST
    assert len(plan_of(ensemble).replays) == replay.MOST


@torch.no_grad()
def test_member_outputs_are_not_those_of_a_sum(log):
    ensemble, members, arguments = unet()
    args, _ = arguments(2)
    stack = torch.stack([member(*args).sample for member in members])
    for _ in range(MANY):
        assert relative_error(ensemble(*args).sample, stack.mean(0)) < NETWORK[torch.float32]
        assert relative_error(ensemble.member_outputs(*args), stack) < NETWORK[torch.float32]
    assert log.count("record") == 2


@torch.no_grad()
def test_what_cannot_be_recorded_is_launched_and_reported(log, monkeypatch):
    attempts = []

    def fails(*_, **__):
        attempts.append(1)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(_graph, "record_graph", fails)
    ensemble, members, arguments = unet()
    args, _ = arguments(2)
    expected = torch.stack([member(*args).sample for member in members]).mean(0)
    for _ in range(MANY):
        assert relative_error(ensemble(*args).sample, expected) < NETWORK[torch.float32]
    assert len(attempts) == 1
    assert "recording failed: RuntimeError: operation not permitted" in str(ensemble.report())


@torch.no_grad()
def test_nothing_is_recorded_where_it_is_not_wanted(log, monkeypatch):
    monkeypatch.setenv("FASTENS_GRAPHS", "0")
    ensemble, _, arguments = unet()
    args, _ = arguments(2)
    for _ in range(MANY):
        ensemble(*args)
    assert not log
    monkeypatch.delenv("FASTENS_GRAPHS")
    with FlopCounterMode(display=False) as counter:  # its hooks are called, so the members' own code runs
        for _ in range(MANY):
            ensemble(*args)
    assert counter.get_total_flops() > 0
    assert not log
    with Passing():
        for _ in range(MANY):
            ensemble(*args)
    assert not log
    for _ in range(MANY):
        ensemble(*args)
    assert log[:2] == ["record", "replay"]
    recorded = len(log)
    monkeypatch.setenv("FASTENS_GRAPHS", "0")
    ensemble(*args)
    assert len(log) == recorded


@torch.no_grad()
def test_calls_that_are_collected_for_tuning_are_launched(log):
    ensemble, _, arguments = unet()
    args, _ = arguments(2)
    for _ in range(MANY):
        ensemble(*args)
    replayed, launched = len(log), []
    plan = plan_of(ensemble)
    launch = plan._bound.launch
    plan._bound.launch = lambda *given: launched.append(given) or launch(*given)
    with tune.observed():
        ensemble(*args)
    assert launched
    assert len(log) == replayed


@torch.no_grad()
@pytest.mark.parametrize("arenas", [replay.SHARE - 1, replay.SHARE])
def test_large_batches_are_recorded_where_their_graphs_fit_the_free_memory(log, monkeypatch, arenas):
    monkeypatch.setattr(replay, "MOST_BYTES", 1000)
    ensemble, _, arguments = unet()
    args, _ = arguments(2)
    monkeypatch.setattr(type(device_of("cuda")), "free_memory", lambda _: arenas * plan_of(ensemble).num_bytes)
    for _ in range(MANY):
        ensemble(*args)
    assert plan_of(ensemble).num_bytes > 1000
    assert bool(log) is (arenas == replay.SHARE)


@torch.no_grad()
def test_graphs_go_with_their_weights(log):
    ensemble, _, arguments = unet()
    args, _ = arguments(2)
    for _ in range(MANY):
        before = ensemble(*args).sample
    plan = weakref.ref(plan_of(ensemble))
    for p in ensemble.parameters():
        p.mul_(1.1)
    after = ensemble(*args).sample
    expected = torch.stack([member(*args).sample for member in ensemble.members]).mean(0)
    assert relative_error(after, expected) < NETWORK[torch.float32]
    assert relative_error(after, before) > 1e-2
    gc.collect()
    assert plan() is None


def test_a_plan_of_inference_mode_serves_without_it(log, monkeypatch):
    monkeypatch.setenv("FASTENS_AUDIT", "off")  # an audit of a sum runs the members apart, which is another graph
    ensemble, members, arguments = unet()
    args, _ = arguments(2)
    with torch.no_grad():
        expected = torch.stack([member(*args).sample for member in members]).mean(0)
    for context in (torch.inference_mode, torch.no_grad):
        for _ in range(MANY):
            with context():
                found = ensemble(*args).sample
            assert relative_error(found, expected) < NETWORK[torch.float32]
    assert log.count("record") == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rule", ["mean", "median", "alternating"])
@torch.no_grad()
def test_replays_on_the_device(rule, monkeypatch):
    members, arguments = members_of("unet_2d", 2)
    ensemble = fastens.Ensemble(members, rule, engine="fold").cuda()
    (x, *rest), _ = arguments(2)
    results = {}
    for graphs in ("0", "1"):
        monkeypatch.setenv("FASTENS_GRAPHS", graphs)
        with ensemble.trajectory(len(x), 3):
            results[graphs] = [ensemble((1 + i / 4) * x.cuda(), *rest).sample for i in range(MANY)]
    assert ensemble.report().graphs, str(ensemble.report())
    for launched, replayed in zip(*results.values(), strict=True):
        assert relative_error(replayed, launched) < 1e-6
