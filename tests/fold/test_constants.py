"""The memory of packed weights, which several threads add to while they record plans."""

import sys
import threading

import pytest
import torch

from fastens.plan.memory import Constants


@pytest.mark.parametrize("trial", range(3))
def test_threads_that_record_at_once(trial):
    """Each finds its own values: none are lost when another makes the memory grow."""
    constants, places = Constants(), {}

    def add(thread):
        for i in range(60):
            values = torch.full((3001,), float(1000 * thread + i))
            places[thread, i] = constants.add((thread, i), values)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=add, args=(k,)) for k in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert len(places) == 8 * 60
    for (thread, i), place in places.items():
        start = place.num_bytes // 4
        found = constants.memory[start : start + 3001]
        torch.testing.assert_close(found, torch.full((3001,), float(1000 * thread + i)))
    assert len({place.num_bytes for place in places.values()}) == len(places)
