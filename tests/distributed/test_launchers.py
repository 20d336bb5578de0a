"""Who starts ranks: torchrun, ``accelerate launch`` and Ray's trainer; each where it is installed."""

import importlib.util
import os
import subprocess
import sys

import pytest

MODULE = "tests.distributed.launched"
RAY = f"""
import sys
import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from {MODULE} import main

ray.init(num_cpus=2, include_dashboard=False, object_store_memory=2**27)
folder = sys.argv[1]
kept = RunConfig(storage_path=f"{{folder}}-ray")
TorchTrainer(lambda: main(folder), scaling_config=ScalingConfig(num_workers=2), run_config=kept).fit()
"""
LAUNCHERS = {
    "torch": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", MODULE],
    # --multi_gpu is its word for several processes
    "accelerate": [
        *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"),
        *("--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0", "-m", MODULE),
    ],
    "ray": ["-c", RAY],
}


@pytest.mark.parametrize("package", LAUNCHERS)
def test_ranks_that_others_start(package, tmp_path):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    run = [sys.executable, *LAUNCHERS[package], str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    assert subprocess.run(run, env=environment, timeout=280).returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]
