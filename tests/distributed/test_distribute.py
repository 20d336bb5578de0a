"""Ensembles over 1, 2 and 4 ranks on the CPU against one process; and what the tests themselves say of a lost rank."""

import functools
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

import fastens
from tests.distributed.cases import K, batch, close, meshes, nets
from tests.distributed.ranks import CASES, WORLDS, World, cases_of


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run a case on so many ranks: those of the case before, where they are as many and none of them failed."""
    worlds = []

    def run(size, case, **times):
        if not worlds or worlds[-1].size != size or not worlds[-1].alive:
            for world in worlds:
                world.end()
            worlds.append(World(size, tmp_path_factory.mktemp("world")))
        return worlds[-1].run(case, **times)

    yield run
    for world in worlds:
        world.end()


def sizes(case):
    """On how many ranks ``make test`` runs a case, beside one; ``make test-full`` has the others.

    Four have meshes in which two share the members, two the rows, and both. Bits, whose cases run every rule over every
    batch, are those of one process on any mesh.
    """
    return 2 if case.startswith("bits_") else 4


EVERY = [
    pytest.param(size, case, marks=() if size in (1, sizes(case)) else pytest.mark.full)
    for size in WORLDS
    for case in cases_of(size)
]


@pytest.mark.parametrize(("size", "case"), EVERY)
def test_every_rank(run, size, case):
    failed = run(size, CASES[case])
    assert not failed, "\n".join(f"rank {rank}:\n{error}" for rank, error in failed.items())


def saves(world, folder):
    spread = fastens.distribute(fastens.Ensemble(nets()), meshes(world)[-1], timeout=60)
    dcp.save(spread.state_dict(), checkpoint_id=folder)


def loads(world, folder):
    spread = fastens.distribute(fastens.Ensemble(nets(2 * K)[K:]), meshes(world)[0], timeout=60)
    wanted, x = fastens.Ensemble(nets()), batch(4, 5)
    with torch.no_grad():
        assert not torch.allclose(spread(x), wanted(x))
        state = spread.state_dict()
        dcp.load(state, checkpoint_id=folder)
        spread.load_state_dict(state)
        close(spread(x), wanted(x))


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 2), (2, 1), (1, 2), (2, 4), (4, 1)])
def test_states_of_another_world(run, before, after, tmp_path):
    """What so many ranks saved is cut anew for as many others."""
    for size, case in ((before, saves), (after, loads)):
        failed = run(size, functools.partial(case, folder=tmp_path / "states"))
        assert not failed, failed


def fails(world):
    assert dist.get_rank() != 1, "of rank 1"
    dist.barrier()


def dies(world):
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def waits(world):
    if dist.get_rank() == 1:
        time.sleep(600)


def is_well(world):
    assert dist.get_world_size() == world


@pytest.mark.parametrize(
    ("case", "said"), [(fails, "of rank 1"), (dies, "died: SIGKILL"), (waits, "did not come to its end")]
)
def test_a_case_that_fails_says_so_and_leaves_the_next_alone(run, case, said):
    failed = run(2, case, timeout=5)
    assert said in failed[1]
    assert run(2, is_well) == {}
