"""Ranks that die or hang: the others raise within the timeout and say who; a job that is started again ends alike."""

import hashlib
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import fastens
from fastens.cli import main
from fastens.distributed.jobs import Job, Pieces
from fastens.evaluation.denoiser import Denoiser
from fastens.evaluation.likelihood import likelihood
from fastens.evaluation.results import Parts
from fastens.evaluation.sampling import sample

CALLED = """
import datetime, os, signal, sys, threading, time
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
import fastens
from fastens.distributed.exchange import RankLost
from tests.networks import mlp, randomised

how, timeout = sys.argv[1], float(sys.argv[2])

def run(rank):
    os.environ["RANK"] = str(rank)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("member", "data"))
    ens = fastens.Ensemble([randomised(mlp, k) for k in range(3)])
    spread = fastens.distribute(ens, mesh, timeout=timeout)
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        spread(x)
        kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
        if rank == 1:
            if how == "dies in some call":
                threading.Timer(0.3, kill).start()
            else:
                kill() if how == "dies" else time.sleep(45)
        try:
            while True:
                begun = time.monotonic()
                spread(x)
        except RankLost as error:
            print("lost", error, flush=True)
            return 7 if time.monotonic() - begun < 25 else 8

ranks = []
for rank in range(2):
    ranks.append(os.fork())
    if not ranks[-1]:
        os._exit(run(rank) or 0)
code = os.waitstatus_to_exitcode(os.waitpid(ranks[0], 0)[1])
os.kill(ranks[1], signal.SIGKILL)
sys.exit(code)
"""


def environment(rank, world, port):
    ours = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {**os.environ, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in ours.items()}}


def free_port():
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.mark.parametrize(("how", "timeout"), [("dies", 20), ("dies in some call", 20), ("hangs", 10)])
def test_a_lost_rank_is_an_error_on_the_others_and_is_named(how, timeout):
    run = [sys.executable, "-c", CALLED, how, str(timeout)]
    found = subprocess.run(run, env=environment(0, 2, free_port()), stdout=subprocess.PIPE, text=True, timeout=200)
    assert found.returncode == 7, found.stdout
    assert "lost rank 1 of [0, 1] did not answer within" in found.stdout


KILLED = """
import os, sys
import numpy as np
import torch
torch.set_num_threads(1)
import fastens
from fastens.cli import main
save, saved = np.save, []

def killed(path, array):
    saved.append(path)
    if len(saved) == 2:  # in the middle of a file
        path.write_bytes(b"half of it")
        os.kill(os.getpid(), 9)
    save(path, array)

np.save = killed
main(sys.argv[1:])
"""


def digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir()) if p.suffix != ".json"}


def test_a_killed_job_goes_on_and_ends_with_the_same_bytes(folders, tmp_path, monkeypatch):
    alone, several = tmp_path / "alone", tmp_path / "several"
    options = ["--num", "10", "--batch", "2", "--steps", "4", "--rule", "median", "--device", "cpu", "--quiet"]
    command = ["sample", *folders, *options, "--timeout", "60", "--out"]
    main([*command, str(alone)])
    run = [sys.executable, "-c", KILLED, *command, str(several)]
    assert subprocess.run(run, env=environment(1, 2, 0), timeout=250).returncode == -signal.SIGKILL
    pieces = several / "pieces"
    kept = {path: path.stat().st_mtime_ns for path in pieces.glob("0*.npy")}
    assert [path.name for path in kept] == ["0000001.npy"]  # of 1 and 3, which are rank 1's
    assert len(list(pieces.glob(".*.partial.*"))) == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        main([*command, str(several)])
        if rank:
            assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
            assert len(list(pieces.glob("0*.npy"))) == 2
    assert digests(several) == digests(alone)
    assert not pieces.exists()


KILLED_AT_RANDOM = """
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)
import fastens.runs, fastens.uncertainty.plots, diffusers
from fastens.cli import main

seed, alone, several, *command = sys.argv[1:]
chance, delay, kills = random.Random(int(seed)), 0.5, 0

def started(rank, world, out):
    child = os.fork()
    if not child:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
        try:
            main([*command, "--out", out])
            os._exit(0)
        finally:
            os._exit(1)
    return child

begun = time.monotonic()
assert os.waitpid(started(0, 1, alone), 0)[1] == 0
took = time.monotonic() - begun
running = {}
while True:
    world = chance.choice([1, 2, 3])  # as many as there happen to be
    ranks = [started(rank, world, several) for rank in range(world)]
    time.sleep(chance.uniform(0, took * (1 + kills / 4)))
    ended = {rank: os.waitpid(rank, os.WNOHANG) for rank in ranks}
    for rank in ranks:
        if ended[rank][0] == 0:
            os.kill(rank, signal.SIGKILL)
            ended[rank] = os.waitpid(rank, 0)
    kills += any(code for _, code in ended.values())
    assert all(code in (0, signal.SIGKILL) for _, code in ended.values()), ended
    if ended[ranks[0]][1] == 0:  # the first writes the whole
        break
print("kills", kills)
"""


@pytest.mark.parametrize("options", [["--num", "9", "--rule", "mixture"], ["--per-member", "4"]])
def test_a_job_that_is_killed_at_random_times_ends_with_the_same_bytes(options, folders, tmp_path):
    """On one to three ranks, each time on another number; until the first rank comes to its end."""
    alone, several = tmp_path / "alone", tmp_path / "several"
    common = ["--batch", "2", "--steps", "4", "--device", "cpu", "--quiet", "--timeout", "60"]
    run = [sys.executable, "-c", KILLED_AT_RANDOM, "0", str(alone), str(several), "sample", *folders, *options, *common]
    assert subprocess.run(run, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=500).returncode == 0
    assert digests(several) == digests(alone)
    assert not (several / "pieces").exists()


def test_pieces_of_another_job_are_refused(tmp_path):
    job = Job()
    Pieces(tmp_path, {"seed": 0}).make(job, 2, lambda piece: np.full(3, piece))
    with pytest.raises(ValueError, match=r"pieces of another job: seed differ; take another --out"):
        Pieces(tmp_path, {"seed": 1})
    made = Pieces(tmp_path, {"seed": 0}).make(job, 3, lambda piece: np.full(3, 10 + piece))
    assert [int(each[0]) for each in made] == [0, 1, 12]


def test_a_job_that_lacks_a_rank_ends_with_an_error_that_names_it(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(TimeoutError, match=r"2 of 4 pieces are missing, of rank 1, and none came in 0.2 s"):
        Pieces(tmp_path, {}).make(Job(timeout=0.2), 4, lambda piece: np.zeros(1))
    assert sorted(path.name for path in tmp_path.glob("0*.npy")) == ["0000000.npy", "0000002.npy"]


def test_a_part_that_was_not_written_whole_is_made_again(tmp_path):
    (tmp_path / f".{2**22 + 1}.1.partial.0000000.npy").write_bytes(b"half")  # a process that is no more
    made = Pieces(tmp_path, {}).make(Job(), 1, lambda _: torch.ones(2).numpy())
    assert made[0].tolist() == [1, 1]
    assert not list(tmp_path.glob(".*partial*"))


class Shrinks(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(0.5))
        self.calls = 0

    def forward(self, x, t):
        self.calls += 1
        return self.factor * x


def test_ranks_share_the_parts_of_an_evaluation_and_its_numbers_are_those_of_one(tmp_path, monkeypatch):
    def run(cache):
        denoiser = Denoiser(Shrinks(), fastens.schedules.VP(), "epsilon")
        samples = sample(denoiser, 7, (1, 2, 2), steps=3, batch_size=2, cache=cache)
        options = dict(levels=None, method="euler", steps=2, batch_size=2, cache=cache)
        return samples, likelihood(denoiser, samples, **options), denoiser.model.calls

    alone, bits, calls = run(None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    write, written = Parts.write, []
    monkeypatch.setattr(Parts, "write", lambda self, name, arrays: (written.append(name), write(self, name, arrays)))
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        samples, found, used = run(tmp_path)
        assert torch.equal(samples, alone)
        assert np.array_equal(found.bits_per_dim, bits.bits_per_dim)
        assert found.evaluations == bits.evaluations
    assert written[0] == "samples_0000004_2"  # the second rank begins in the middle
    assert len(written) == len(set(written)) == 8
    assert used < calls
