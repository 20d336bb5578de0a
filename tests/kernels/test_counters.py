"""Which launches share counters: those of one stream, and captured ones that write the same result; no others."""

from types import SimpleNamespace

import pytest
import torch

from fastens.device import device_of

_counters = pytest.importorskip("fastens.kernels._counters")


@pytest.fixture
def device(monkeypatch):
    """Streams as on a device of its own, whose memory is the CPU's."""
    state = SimpleNamespace(stream=1, capturing=False)
    monkeypatch.setattr(
        torch.cuda,
        "current_stream",
        lambda _: SimpleNamespace(cuda_stream=state.stream, synchronize=lambda: None),
    )
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(_counters, "device_of", lambda _: device_of("cuda"))
    for name in ("_of_streams", "_for_captures", "_captured"):
        monkeypatch.setattr(_counters, name, {})
    return state


def result(place):
    return SimpleNamespace(device=torch.device("cpu"), is_cuda=True, data_ptr=lambda: place)


def test_launches_of_a_stream_share_and_streams_do_not(device):
    first, again = _counters.counters(3, result(0)), _counters.counters(40, result(1))
    assert first.data_ptr() == again.data_ptr()
    device.stream = 2
    assert _counters.counters(3, result(0)).data_ptr() != first.data_ptr()
    assert len(_counters.counters(5000, result(0))) == 5000


def test_captured_launches_share_with_those_of_the_same_result_alone(device, monkeypatch):
    monkeypatch.setattr(_counters, "OF_CAPTURES", 10)
    of_stream = _counters.counters(3, result(0))
    device.capturing = True
    taken = [_counters.counters(4, result(place)) for place in (0, 1, 0)]
    places = [{t.data_ptr() + 4 * i for i in range(len(t))} for t in (*taken, of_stream)]
    assert places[0] == places[2]
    assert not places[0] & places[1]
    assert not places[3] & (places[0] | places[1])
    beyond = _counters.counters(4, result(2))  # than there are for captures: the graph zeroes them
    assert beyond.tolist() == [0] * 4
    assert (2, 4) not in {key[1:] for key in _counters._captured}


def test_on_the_cpu_each_launch_has_its_own():
    first, second = (_counters.counters(3, torch.empty(1)) for _ in range(2))
    assert first.data_ptr() != second.data_ptr()
    assert second.tolist() == [0, 0, 0]
