"""Tuning ahead of use: what is collected, measured, resumed and written."""

import json

import pytest
import torch
from torch import nn

import fastens
from fastens import tune
from fastens.cli import main
from fastens.ops import _choice
from fastens.ops._choice import Choice, Table, Way
from fastens.ops.conv import CHOICE
from tests.networks import randomised, unet_2d


@pytest.fixture
def scaled(tmp_path, monkeypatch):
    """An op of two ways on the CPU, whose second is the faster by its clock, and what was run."""
    ran = []

    def way(name, factor):
        def run(x, offsets):
            ran.append((name, tuple(x.shape), x.stride()))
            return x * factor

        return run

    monkeypatch.setattr(_choice, "CHOICES", {})
    monkeypatch.setattr(tune, "CHOICES", _choice.CHOICES)
    ways = {"slow": Way(way("slow", 2)), "fast": Way(way("fast", 2))}
    times = iter([2.0, 1.0] * 100)
    choice = Choice(
        "scale", lambda x, offsets: f"{list(x.shape)} {x.stride()}", ways, table=Table(tmp_path / "choices.json"),
        clock=lambda run, device: lambda: next(times), devices=("cpu",),
    )  # fmt: skip
    return choice, ran


CPU = torch.device("cpu")


@torch.no_grad()
def test_different_calls_are_collected_measured_once_and_written(scaled, tmp_path):
    choice, ran = scaled
    x, offsets = torch.ones(3, 4), torch.tensor([0, 1])
    with tune.observed() as calls:
        for value in (x, 2 * x, x.T, x[:2]):
            assert choice.choose((value, offsets), CPU) == "slow"  # nothing is measured meanwhile
    assert len(calls) == 3
    assert not ran
    seen = []
    assert tune.tune(calls, CPU, lambda unknown: (seen.append(len(unknown)), iter(unknown))[1]) == 3
    assert seen == [3]
    assert ("fast", (4, 3), (1, 4)) in ran  # in the layout that the network has
    assert choice.choose((x, offsets), CPU) == "fast"
    assert tune.export(tmp_path / "table.json", CPU) == 3
    table = json.loads((tmp_path / "table.json").read_text())
    assert {entry["chosen"] for entry in table["cpu"]["scale"].values()} == {"fast"}


@torch.no_grad()
def test_an_interrupted_run_is_resumed(scaled):
    choice, _ = scaled
    offsets = torch.tensor([0, 1])
    with tune.observed() as calls:
        for n in (1, 2, 3):
            choice.choose((torch.ones(n), offsets), CPU)

    def interrupted(unknown):
        yield unknown[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune.tune(calls, CPU, interrupted)
    choice.table = Table(choice.table.path)  # another process
    assert tune.tune(calls, CPU) == 2
    assert tune.tune(calls, CPU) == 0


@torch.no_grad()
def test_moments_are_those_of_some_image(scaled):
    choice, _ = scaled
    given = []
    choice.ways["fast"] = Way(lambda x, offsets: given.append(x) or 2 * x)
    with tune.observed() as calls:
        choice.choose((torch.ones(4, 8, 3, 2), torch.tensor([0, 1])), CPU)
    tune.tune(calls, CPU)
    assert (given[0][..., 1] >= 0).all()  # sums of squares: of a negative one, a norm would be NaN in every way
    assert (given[0][..., 0] < 0).any()


def test_a_network_tells_its_convolutions():
    members = [nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)) for _ in range(2)]
    ensemble = fastens.Ensemble(members, backend="reference").eval()
    with torch.no_grad():
        expected = ensemble(torch.ones(2, 3, 9, 9))
        with tune.observed() as calls:
            torch.testing.assert_close(ensemble(torch.ones(2, 3, 9, 9)), expected)
    assert len(calls) == 3  # the last two differ in the size of their input
    assert {op for op, _ in calls} == {"conv"}
    assert all(x.is_meta for _, arguments in calls.values() for x in arguments if isinstance(x, torch.Tensor))
    assert CHOICE.observer is None


def test_a_checkpoint_tells_its_convolutions_at_each_batch():
    members = [randomised(lambda: unet_2d(False), seed).to(memory_format=torch.channels_last) for seed in range(2)]
    ensemble = fastens.Ensemble(members, backend="reference").eval()
    one, both = (tune.calls_of(ensemble, batches) for batches in ((1,), (1, 3)))
    assert len(both) == 2 * len(one) > 8
    assert any("kernels channels_last" in key for _, key in one)


def test_the_command_says_what_it_lacks(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as status:
        main(["tune", "nowhere"])
    assert status.value.code == 2
    assert "torch sees none" in capsys.readouterr().err
