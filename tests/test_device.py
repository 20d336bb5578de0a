"""What a device answers: a CPU, one that nothing of ours serves, a GPU of stand-ins; and the questions of any GPU."""

import inspect
from types import SimpleNamespace

import pytest
import torch

from fastens import device
from fastens.device import Device, device_of
from fastens.ops import _tma_ways
from fastens.ops._choice import Choice, Table, Way
from fastens.ops._dispatch import missing, missing_triton

CUDA = type(device_of("cuda"))


def test_the_same_device_is_the_same_object():
    x = torch.zeros(1)
    assert device_of(x) is device_of("cpu") is device_of(torch.device("cpu"))
    assert device_of("cuda:1") is not device_of("cuda:0")
    assert device_of("cuda:1").where == torch.device("cuda", 1)


@pytest.mark.parametrize("name", ["cpu", "meta", "mps"])
def test_without_launches_nothing_is_asked_of_a_gpu(name, monkeypatch):
    monkeypatch.setattr(torch, "cuda", None)
    found = device_of(name)
    assert (found.launches, found.name, found.multiprocessors) == (False, name, device.MULTIPROCESSORS)
    assert found.capability is found.generation is None
    assert found.library == ("cpu" if name == "cpu" else None)
    assert (found.capturing(), found.stream(), found.free_memory()) == (False, 0, 0)
    found.settle()
    with found.current(), found.turns(), found.turns():
        assert 0 < found.stopwatch()(lambda: sum(range(1000))) < 1
    with pytest.raises(RuntimeError, match=f"none are on {name}"):
        found.record(lambda: None, lambda: None)


@pytest.mark.parametrize("name", [name for name in vars(Device) if not name.startswith("_")])
def test_every_kind_of_gpu_answers_for_itself(name):
    """What a CPU answers would be wrong for a GPU, but for what follows from other answers."""
    for kind in device._KINDS.values():
        if kind.launches and name != "generation":
            assert name in vars(kind), f"{kind.__name__} answers {name!r} as a device without launches does"
            here, there = vars(Device)[name], vars(kind)[name]
            if inspect.isfunction(here):
                assert list(inspect.signature(here).parameters) == list(inspect.signature(there).parameters)


@pytest.mark.parametrize(
    ("capability", "triton", "descriptors"),
    [
        ((7, 5), False, False),
        ((8, 6), True, False),
        ((9, 0), True, True),
        ((10, 0), True, True),
        ((12, 0), True, False),
    ],
)
def test_a_capability_decides_what_runs(capability, triton, descriptors, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    pytest.importorskip("triton")
    where = torch.device("cuda:0")
    assert triton is not ("need compute capability 8.0, and cuda:0 has" in (missing_triton(where) or ""))
    monkeypatch.setattr(_tma_ways, "missing_triton", lambda _: None)
    x = SimpleNamespace(device=where, dtype=torch.bfloat16, element_size=lambda: 2, shape=(2, 64, 8, 8))
    why = _tma_ways.refuses_tma("tma 128x128", x, torch.zeros(2, 128, 64, 3, 3, dtype=torch.bfloat16), (1, 1), (8, 8))
    assert descriptors is not ("compute capability 9 or 10" in (why or ""))


def test_a_device_that_no_library_serves_is_named():
    assert "these are on meta" in missing("op", "native", torch.device("meta"), torch.float32)
    assert "these are on meta" in missing("op", "triton", torch.device("meta"), torch.float32)


def test_a_choice_is_measured_on_gpus_alone():
    assert tuple(kind for kind in device._KINDS if device_of(kind).launches) == device.GPUS
    choice = Choice("op", str, {"only": Way(lambda x: x)}, table=Table(None))
    assert choice.devices == device.GPUS


class Gpu:
    """A second GPU, as torch would tell of it, and what was asked of it."""

    def __init__(self, monkeypatch):
        self.log, self.clock = [], iter(range(1, 100))
        stream = SimpleNamespace(cuda_stream=7, wait_event=lambda event: self.log.append("wait"))
        memory = {"memory_reserved": 500, "memory_allocated": 200, "mem_get_info": (1000, 4000)}
        for name, value in {**memory, "current_stream": stream, "get_device_name": "A GPU"}.items():
            monkeypatch.setattr(torch.cuda, name, lambda where, value=value: self.asked(where) or value)
        monkeypatch.setattr(torch.cuda, "Event", self.event)
        monkeypatch.setattr(torch.cuda, "device", lambda where: self.asked(where) or device._NOTHING)

    def asked(self, where):
        assert where == torch.device("cuda:1")

    def event(self, enable_timing=False):
        made = SimpleNamespace(at=0, synchronize=lambda: self.log.append("synchronize"))
        made.record = lambda stream=None: self.log.append("record") or setattr(made, "at", next(self.clock))
        made.elapsed_time = lambda other: 1e3 * (other.at - made.at)
        return made


def test_a_gpu_is_asked_about_itself(monkeypatch):
    gpu = Gpu(monkeypatch)
    found = device_of("cuda:1")
    assert (found.name, found.stream(), found.free_memory()) == ("A GPU", 7, 1300)
    with found.turns() as turns:
        gpu.log.append(turns)
    assert gpu.log == ["wait", None, "record"]


def test_a_use_that_fails_lets_the_next_wait_for_what_it_launched(monkeypatch):
    gpu = Gpu(monkeypatch)
    turns = device_of("cuda:1").turns()
    with pytest.raises(ZeroDivisionError), turns:
        gpu.log.append(1 // 0)
    assert gpu.log == ["wait", "record"]


def test_a_stopwatch_of_a_gpu_tells_what_is_between_two_events(monkeypatch):
    gpu = Gpu(monkeypatch)
    assert device_of("cuda:1").stopwatch()(lambda: gpu.log.append("run")) == 1
    assert gpu.log == ["record", "run", "record", "synchronize"]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_gpu_of_a_process_is_one_of_those_that_there_are(count, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    found = [device.gpu(number) for number in (None, 0, 1, 4)]
    if not count:
        assert found == [None] * 4
        assert not device.capturing()
    else:
        assert [str(each.where) for each in found] == ["cuda", "cuda:0", f"cuda:{1 % count}", f"cuda:{4 % count}"]


def test_generators_without_a_gpu_are_the_cpus():
    assert device_of("cpu").generator() is torch.default_generator
    before = torch.get_rng_state()
    with device.random_forked():
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    device.set_random_states(device.random_states())
