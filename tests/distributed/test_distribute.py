"""Ensembles over 1, 2 and 4 ranks on the CPU against one process; each world is started once for all cases."""

import json
import os
import subprocess
import sys

import pytest

from tests.distributed.ranks import WORLDS, cases_of


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("worlds")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    run = [sys.executable, "-m", "tests.distributed.ranks", str(folder)]
    assert subprocess.run(run, env=environment, timeout=900).returncode == 0
    return {
        world: [json.loads((folder / f"{world}-{rank}.json").read_text()) for rank in range(world)] for world in WORLDS
    }


@pytest.mark.parametrize(("world", "case"), [(world, case) for world in WORLDS for case in cases_of(world)])
def test_every_rank(found, world, case):
    failed = {rank: of_rank[case] for rank, of_rank in enumerate(found[world]) if of_rank[case]}
    assert not failed, "\n".join(f"rank {rank}:\n{error}" for rank, error in failed.items())
