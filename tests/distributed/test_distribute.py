"""Ensembles over 2 and 4 ranks on the CPU against one process; each world is started once for all cases."""

import json
import os
import subprocess
import sys

import pytest

from tests.distributed.fault_cases import CASES

WORLDS = (2, 4)


def start(world, *command, **options):
    """Ranks under torchrun."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}", *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", **options.pop("env", {})}
    return subprocess.Popen(run, env=environment, **options)


@pytest.fixture(scope="module", params=WORLDS)
def world(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"world{request.param}")
    assert start(request.param, "-m", "tests.distributed.ranks", str(folder)).wait(900) == 0
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(request.param)]


@pytest.mark.parametrize("case", list(CASES))
def test_every_rank(world, case):
    failed = {rank: found[case] for rank, found in enumerate(world) if found[case]}
    assert not failed, "\n".join(f"rank {rank}:\n{error}" for rank, error in failed.items())
