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
