import os
import subprocess
import sys
import threading

import numpy as np
import pytest

import fastens
from tests.tabular.forests import fitted, rows
from tests.tabular.test_forest import needs_module

REPEATED = """
import sys, time
import numpy as np, torch, fastens
torch.set_num_threads(int(sys.argv[2]))
forest = fastens.Forest.load(sys.argv[1])
x = np.random.default_rng(0).normal(size=(20_000, forest.num_features))
expected = {rule: forest.predict(x, rule, backend="reference") for rule in ("mean", "median")}
for _ in range(30):
    for rule, result in expected.items():
        assert np.array_equal(forest.predict(x, rule), result), rule
    assert np.array_equal(forest.predict(x[:900]), expected["mean"][:900])
began = time.process_time()
time.sleep(0.5)
assert time.process_time() - began < 0.1, "helpers do not sleep"
"""


@pytest.mark.covering(1)
@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("policy", ["passive", None])  # under "active" the threads of OpenMP itself never sleep
def test_helpers_give_the_same_result_and_sleep_afterwards(policy, threads, tmp_path):
    needs_module()
    fastens.Forest.from_sklearn(fitted()).save(tmp_path / "forest.bin")
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": policy} if policy else {}
    command = [sys.executable, "-c", REPEATED, tmp_path / "forest.bin", str(threads)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr


def test_one_forest_serves_many_threads():
    forest = fastens.Forest.from_sklearn(fitted(depth=None))
    inputs = [rows(n=700, seed=s) for s in range(4)]
    expected = [forest.predict(x, "median", backend="reference") for x in inputs]
    wrong = []

    def work(i):
        for _ in range(20):
            if not np.array_equal(forest.predict(inputs[i], "median"), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


FORKED = """
import os, sys, threading, time
import numpy as np, torch, fastens
torch.set_num_threads(int(sys.argv[3]))
x = np.random.default_rng(0).normal(size=(6_000, 10))
forests = [fastens.Forest.load(path) for path in sys.argv[1:3]]
calls = [(forest, rule) for forest in forests for rule in ("mean", "median", "geometric", "alternating")]
ask = lambda forest, rule: forest.predict(x, rule, generator=torch.Generator().manual_seed(0))
expected = [ask(*call) for call in calls]
busy, stop = [], threading.Event()
def work(k):
    while not stop.is_set():
        ask(*calls[k])
for k in (0, 1, 5):
    busy.append(threading.Thread(target=work, args=(k,)))
    busy[-1].start()
failures = []
for number in range(4):
    child = os.fork()
    if not child:
        again = [ask(*call) for call in calls]
        os._exit(not all(np.array_equal(a, b) for a, b in zip(again, expected)))
    ends = time.monotonic() + 20
    while not (ended := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < ends:
        time.sleep(0.01)
    if ended != (child, 0):
        failures.append("differs" if ended[0] else "hangs")
        os.kill(child, 9) if not ended[0] else None
        break
stop.set()
for thread in busy:
    thread.join()
print(failures)
"""


@pytest.mark.filterwarnings("ignore:.*fork")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_forked_process_gets_the_same_result(threads, tmp_path):
    """While threads of its parent are in the forest, with helpers and with threads of OpenMP."""
    forest = fastens.Forest.from_sklearn(fitted())
    forest.save(tmp_path / "trees")
    pairs = fastens.Forest(forest.trees, ranges=[0, 2, 4, 6, 8, 10])  # members that torch combines
    pairs.save(tmp_path / "pairs")
    command = [sys.executable, "-W", "ignore", "-c", FORKED, tmp_path / "trees", tmp_path / "pairs", str(threads)]
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=True)
    assert result.stdout.strip() == "[]"
