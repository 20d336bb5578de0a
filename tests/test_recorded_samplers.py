"""Recorded runs of samplers, replayed where all is as it was: by code that runs again in place of a CUDA graph."""

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastens.evaluation import Denoiser
from fastens.samplers import RECORDED_STEPS, Sampler
from tests.evaluation.densities import MixtureNetwork
from tests.replayed import replayed_by_code
from tests.test_samplers import MEANS, SCHEDULES, ensemble


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.fixture
def replays(monkeypatch):
    """Code that runs again into the same memory, in place of CUDA graphs; how often it did."""
    return replayed_by_code(monkeypatch)


@pytest.mark.parametrize("steps", [1, 2, RECORDED_STEPS + 1, 2 * RECORDED_STEPS + 4])
@pytest.mark.parametrize(("method", "options"), [
    ("ddim", {}), ("ddim", {"eta": 1.0}), ("ddim", {"eta": 0.5, "clip": (-1.0, 1.0)}), ("euler", {}), ("heun", {}),
])  # fmt: skip
def test_recorded_runs_give_the_same_samples(method, options, steps, replays):
    denoiser = Denoiser(ensemble(), SCHEDULES["vp"])
    sampler = Sampler(denoiser, method, steps=steps, **options)
    numbers = torch.tensor([7, 3])
    expected = [sampler(numbers, (3,), seed) for seed in (0, 11, 2**64 - 1)]
    sampler._record(2, (3,))
    found = [sampler(numbers, (3,), seed) for seed in (0, 11, 2**64 - 1)]
    assert len(replays) == 3 * (max(1, -(-(steps - 1) // RECORDED_STEPS)) + 1 if steps > 1 else 1)
    for actual, wanted in zip(found, expected, strict=True):  # none was overwritten by the next
        assert torch.equal(actual, wanted)
    count = len(replays)
    assert torch.equal(sampler(torch.tensor([3]), (3,), 11), expected[1][1:])  # another size runs step by step
    assert len(replays) == count


def test_heun_without_noise_at_the_end_is_recorded_too(replays):
    schedule = SCHEDULES["edm"]
    denoiser = Denoiser(MixtureNetwork(schedule, MEANS, 0.2, "x0").eval(), schedule, "x0")
    sampler = Sampler(denoiser, "heun", times=[20.0, 5.0, 1.0, 0.2, 0.0])
    expected = sampler(4, (3,))
    sampler._record(4, (3,))
    assert torch.equal(sampler(4, (3,)), expected)
    assert len(replays) == 2


def in_place(model):
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)


def moved(model):
    for p in model.parameters():
        p.data = 1.5 * p.data


def other_rule(model):
    model.rule = "median"


@pytest.mark.parametrize("change", [in_place, moved, other_rule])
def test_recordings_of_what_has_changed_are_not_replayed(change, replays):
    model = ensemble()
    sampler = Sampler(Denoiser(model, SCHEDULES["vp"]), steps=4)
    sampler._record(2, (3,))
    before = sampler(2, (3,))
    count = len(replays)
    assert count
    change(model)
    after = sampler(2, (3,))
    assert len(replays) == count
    assert torch.equal(after, Sampler(Denoiser(model, SCHEDULES["vp"]), steps=4)(2, (3,)))
    assert not torch.equal(after, before)
    sampler._record(2, (3,))
    assert torch.equal(sampler(2, (3,)), after)
    assert len(replays) > count


class AfterOneLayer(nn.Module):
    """No ensemble: layers that drop when they are trained."""

    def __init__(self):
        super().__init__()
        self.layer, self.dropped = nn.Linear(3, 3), nn.Dropout(0.5)

    def forward(self, x, t):
        return self.dropped(self.layer(x.to(self.layer.weight.dtype)))


@contextlib.contextmanager
def in_precision(precision):
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


SETTINGS = {
    "autocast": lambda model: torch.autocast("cpu", torch.bfloat16),
    "precision": lambda model: in_precision("tf32"),
    "mode": lambda model: Watching(),
    "training": lambda model: contextlib.nullcontext(model.train()),
    "training of a part": lambda model: contextlib.nullcontext(next(model.children()).train()),
}


@pytest.mark.parametrize("make", [ensemble, lambda: AfterOneLayer().eval()], ids=["ensemble", "module"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_recordings_are_of_their_settings(setting, make, replays):
    sampler = Sampler(Denoiser(make(), SCHEDULES["vp"], "epsilon"), steps=4)
    sampler._record(2, (3,))
    sampler(2, (3,))
    count = len(replays)
    assert count
    with SETTINGS[setting](sampler.denoiser.model):
        sampler(2, (3,))
    assert len(replays) == count


@pytest.mark.parametrize("what", ["a run", "an evaluation"])
def test_callers_replay_one_at_a_time(what, monkeypatch):
    replayed_by_code(monkeypatch, before=lambda: time.sleep(0.02))  # another caller's turn
    model = ensemble()
    sampler = Sampler(Denoiser(model, SCHEDULES["vp"]), steps=4)
    inputs, t = torch.randn(3, 2, 3), torch.rand(2)

    def call(i):
        with torch.no_grad():
            return sampler(2, (3,), seed=i) if what == "a run" else model(inputs[i], t)

    expected = [call(i) for i in range(3)]
    if what == "a run":
        sampler._record(2, (3,))
    else:
        model._record((inputs[0], t), {})
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(call, range(3)))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
