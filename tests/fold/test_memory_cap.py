"""A folded pass takes no more rows than were asked for, or than fit, and the results stay the same."""

import sys
import warnings

import pytest
import torch
from torch import nn

import fastens
from fastens.engine import memory_cap
from fastens.engine.memory_cap import Allocations, available_memory, is_out_of_memory
from fastens.ops.draw_members import draw_members
from tests.fresh import python
from tests.networks import NETWORKS, randomised, tensor_of
from tests.tolerances import NETWORK, relative_error

KINDS = ["mlp", "unet_2d_attention", "pixart", "transformer_time_first", "gru", "edm_like"]


def members_of(name, count=3):
    make, arguments = NETWORKS[name]
    return [randomised(make, seed) for seed in range(count)], arguments(4)


def stack_of(output):
    return output[0] if isinstance(output, tuple) else output


def wide(batch=64, width=256):
    members = [
        randomised(lambda: nn.Sequential(nn.Linear(8, width), nn.SiLU(), nn.Linear(width, 8)), s) for s in range(4)
    ]
    return members, torch.randn(batch, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def passes(monkeypatch):
    """The rows of every folded pass."""
    seen = []
    original = fastens.engine.engine.Engine.run

    def watched(self, fold, arguments, method="forward", rows=False):
        seen.append(fold.hidden.size * (1 if rows else arguments.batch_size))
        return original(self, fold, arguments, method, rows)

    monkeypatch.setattr(fastens.engine.engine.Engine, "run", watched)
    return seen


@pytest.mark.parametrize("max_fold", [1, 5, 7, 11, 12, 13])
@pytest.mark.parametrize("name", KINDS)
def test_any_cap_gives_the_same(name, max_fold, passes):
    members, (args, kwargs) = members_of(name)
    capped = fastens.Ensemble(members, engine="fold", max_fold=max_fold)
    with torch.no_grad():
        expected = torch.stack([tensor_of(member(*args, **kwargs)) for member in members])
        outputs = stack_of(capped.member_outputs(*args, **kwargs))
        assert relative_error(outputs, expected) < NETWORK[torch.float32]
    assert capped.engine == "fold"
    assert max(passes) == (min(max_fold, 12) // 4 * 4 or max_fold)  # whole members of four rows, where one fits


@pytest.mark.parametrize("max_fold", [1, 3])
def test_drawn_members_keep_to_the_cap(max_fold, passes):
    members, (args, kwargs) = members_of("unet_2d")
    ensemble = fastens.Ensemble(members, "mixture", engine="fold", max_fold=max_fold)
    with torch.no_grad(), ensemble.trajectory(4, 3):
        drawn = draw_members(3, 0, 3, 4)
        output = tensor_of(ensemble(*args, **kwargs))
        stack = torch.stack([tensor_of(member(*args, **kwargs)) for member in members])
    assert relative_error(output, stack[drawn, torch.arange(4)]) < NETWORK[torch.float32]
    assert max(passes) == max_fold


@pytest.mark.parametrize("free", [200_000, 20_000, 1])
def test_takes_as_many_rows_as_fit(free, monkeypatch, passes):
    members, x = wide()
    ensemble = fastens.Ensemble(members)
    monkeypatch.setattr(memory_cap, "available_memory", lambda: free)
    with torch.no_grad():
        expected = torch.stack([member(x) for member in members])
        with pytest.warns(UserWarning, match="256 rows in one pass need about .* MiB are free") as told:
            outputs = ensemble.member_outputs(x)
        assert len(told) == 1
        assert relative_error(outputs, expected) < NETWORK[torch.float32]
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # it is said once
            assert relative_error(ensemble.member_outputs(x), expected) < NETWORK[torch.float32]
    per_row = 2 * 256 * 4  # two hidden layers at once
    assert 0.7 * free / per_row * 0.75 <= max(passes) <= max(1, free / per_row)
    assert ensemble.engine == "fold"


def test_memory_enough_means_one_pass(monkeypatch, passes):
    monkeypatch.setenv("FASTENS_AUDIT", "off")
    members, x = wide()
    ensemble = fastens.Ensemble(members)
    monkeypatch.setattr(memory_cap, "available_memory", lambda: 2_000_000)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        ensemble(x)
        ensemble(x)
    assert set(passes) == {256}


@pytest.mark.parametrize("limit", [64, 9, 1])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_halves_the_fold_that_runs_out_and_remembers(limit, error, monkeypatch, passes):
    members, x = wide()
    ensemble = fastens.Ensemble(members)
    original = fastens.engine.engine.Engine.run
    failed = []

    def limited(self, fold, arguments, method="forward", rows=False):
        count = fold.hidden.size * arguments.batch_size
        if count > limit:
            failed.append(count)
            raise error("out of memory")
        return original(self, fold, arguments, method, rows)

    monkeypatch.setattr(fastens.engine.engine.Engine, "run", limited)
    with torch.no_grad():
        expected = torch.stack([member(x) for member in members])
        with pytest.warns(UserWarning, match="a pass of 256 rows ran out of memory, so one takes 128"):
            assert relative_error(ensemble.member_outputs(x), expected) < NETWORK[torch.float32]
        assert failed == [256, *(2**n for n in range(8, 0, -1) if 2**n > limit)]  # recording it for a plan fails too
        assert relative_error(ensemble.member_outputs(x), expected) < NETWORK[torch.float32]
        assert len(failed) == 1 + len([2**n for n in range(8, 0, -1) if 2**n > limit])
    assert ensemble.engine == "fold"


def test_one_row_that_does_not_fit_is_the_callers_error(monkeypatch):
    members, x = wide(batch=1)
    ensemble = fastens.Ensemble(members)
    with torch.no_grad():
        ensemble.member_outputs(x)

        def exhausted(self, *_):
            raise torch.OutOfMemoryError("out of memory")

        monkeypatch.setattr(fastens.engine.engine.Engine, "one_pass", exhausted)
        monkeypatch.setattr(fastens.engine.engine.Engine, "can_plan", lambda *_: False)
        ensemble.refresh()
        with pytest.raises(torch.OutOfMemoryError), pytest.warns(UserWarning, match="ran out"):
            ensemble.member_outputs(x)


def test_allocations_are_those_of_the_operations():
    x = torch.zeros(1000)
    with Allocations() as allocations:
        y = x + 1
        z = (y * 2).view(10, 100)
        del y
        z = z + 1
    assert allocations.total == 12_000
    assert allocations.peak == 8_000


def test_knows_the_memory_here():
    assert 2**20 < available_memory() < 2**50


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
        (RuntimeError("std::bad_alloc"), True),
        (MemoryError(), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("can't allocate memory"), False),
    ],
)
def test_tells_lack_of_memory_from_other_errors(error, expected):
    assert is_out_of_memory(error) is expected


LIMITED = """
import resource, sys, warnings
import torch
from torch import nn
import fastens
from fastens.engine.memory_cap import Allocations, available_memory
torch.set_num_threads(1)
torch.manual_seed(0)
make = lambda: nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.SiLU(), nn.Conv2d(32, 3, 3, padding=1)).eval()
members = [make() for _ in range(8)]
x = torch.randn(8, 3, 128, 128)  # a member's pass takes 34 MB, the folded one 270 MB and more
with torch.no_grad():
    expected = torch.stack([member(x) for member in members])
    with Allocations():  # imports what it needs before memory is short
        members[0](x[:1])
    fastens.Ensemble(members)(x[:1])
    mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + 180 * 2**20,) * 2)
    ensemble = fastens.Ensemble(members, max_fold=64 if sys.argv[1] == "asked" else None)
    if sys.argv[1] == "blind":
        fastens.engine.memory_cap.available_memory = lambda: float("inf")
    for _ in range(2):
        output = ensemble.member_outputs(x)
    print(ensemble.engine, float((output - expected).abs().max()) < 1e-5)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space of a process")
@pytest.mark.parametrize(("way", "notice"), [("foreseen", "need about"), ("blind", "ran out of memory")])
def test_real_limit(way, notice):
    result = python(LIMITED, way)
    assert result.stdout.split() == ["fold", "True"], result.stderr[-2000:]
    assert notice in result.stderr


READS_OF_ROWS = {
    "max": lambda h, t: h if t.max() > 0.5 else 2 * h,
    "all": lambda h, t: h if (t < 0.7).all() else h - 1,
    "item": lambda h, t: h * t[0].item(),
    "list": lambda h, t: h * sum(t.tolist()),
    "mask": lambda h, t: h * (1 + len(t[t > 0.5])),
    "nonzero": lambda h, t: h * (1 + (t > 0.5).nonzero().shape[0]),
    "where": lambda h, t: h * (1 + len(torch.where(t > 0.5)[0])),
    "unique": lambda h, t: h * t.round().unique().numel(),
    "unique as one": lambda h, t: h * torch.unique_consecutive(t.round()).numel(),
    "selected": lambda h, t: h * (1 + t.masked_select(t > 0.5).numel()),
    "counted": lambda h, t: h * len((3 * t).long().bincount()),
    "repeated": lambda h, t: h * (1 + len(t.repeat_interleave((3 * t).long()))),
    "mask of members": lambda h, t: h * (1 + len(h[t > 0.5])),
    "split": lambda h, t: torch.cat([(i + 1) * p for i, p in enumerate(h.tensor_split((4 * t[:1]).long()))]),
}


class ReadsRows(torch.nn.Module):
    def __init__(self, read, late):
        super().__init__()
        self.layer, self.read, self.late = torch.nn.Linear(4, 4), read, late

    def forward(self, x, t):
        h = self.layer(x)
        return self.read(h, t) if x.shape[0] == 1 or not self.late or bool((t > 0.1).any()) else h


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("kind", READS_OF_ROWS)
def test_rows_whose_values_python_reads_stay_together(kind, late):
    """Also where the first times show no difference between rows by themselves and together."""
    torch.manual_seed(0)
    members = [ReadsRows(READS_OF_ROWS[kind], late) for _ in range(3)]
    ensemble, x = fastens.Ensemble(members, max_fold=1), torch.randn(4, 4)
    for t in ([0.05] * 4, [0.05] * 4, [0.2, 0.6, 0.9, 0.3], [0.6, 0.2, 0.3, 0.65], [0.9, 0.8, 0.6, 0.7]):
        times = torch.tensor(t)
        with torch.no_grad():
            expected = torch.stack([member(x, times) for member in members]).mean(0)
            torch.testing.assert_close(ensemble(x, times), expected)
