"""Ranks that die or hang: the others raise within the timeout and say who; a job that is started again ends alike."""

import datetime
import hashlib
import os
import random
import signal
import sys
import threading
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import fastens
from fastens.cli import main
from fastens.distributed.exchange import RankLost
from fastens.distributed.jobs import Job, Pieces
from fastens.evaluation.denoiser import Denoiser
from fastens.evaluation.likelihood import likelihood
from fastens.evaluation.results import Parts
from fastens.evaluation.sampling import sample
from fastens.files import write_json
from tests.distributed.ranks import started
from tests.networks import mlp, randomised


def ended(process, timeout):
    """Its exit code; what takes longer is killed and fails."""
    process.join(timeout)
    code = process.exitcode
    process.kill()
    assert code is not None, f"did not end within {timeout} s"
    return code


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def calls_until_lost(rank, how, timeout, folder):
    """Two ranks, of which the second is lost; the first one writes what it is told, and when."""
    store, minute = f"file://{folder}/store", datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=minute)
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("member", "data"))
    ens = fastens.Ensemble([randomised(mlp, k) for k in range(3)])
    spread = fastens.distribute(ens, mesh, timeout=timeout)
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        spread(x)
        if rank == 1:
            if how == "dies in some call":
                threading.Timer(0.3, killed).start()
            else:
                killed() if how == "dies" else time.sleep(45)
        try:
            while True:
                begun = time.monotonic()
                spread(x)
        except RankLost as error:
            (folder / "lost").write_text(str(error))
            return 7 if time.monotonic() - begun < timeout + 5 else 8


@pytest.mark.parametrize(("how", "timeout"), [("dies", 20), ("dies in some call", 20), ("hangs", 8)])
def test_a_lost_rank_is_an_error_on_the_others_and_is_named(how, timeout, tmp_path):
    first, second = (started(calls_until_lost, rank, how, timeout, tmp_path) for rank in range(2))
    try:
        assert ended(first, 100) == 7
    finally:
        second.kill()
    assert "rank 1 of [0, 1] did not answer within" in (tmp_path / "lost").read_text()


def killed_in_the_middle_of_a_file(command):
    save, saved = np.save, []

    def half(path, array):
        saved.append(path)
        if len(saved) == 2:
            path.write_bytes(b"half of it")
            killed()
        save(path, array)

    np.save = half
    main(command)


def digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir()) if p.suffix != ".json"}


def test_a_killed_job_goes_on_and_ends_with_the_same_bytes(folders, tmp_path, monkeypatch):
    alone, several = tmp_path / "alone", tmp_path / "several"
    options = ["--num", "10", "--batch", "2", "--steps", "4", "--rule", "median", "--device", "cpu", "--quiet"]
    command = ["sample", *folders, *options, "--timeout", "60", "--out"]
    main([*command, str(alone)])
    process = started(killed_in_the_middle_of_a_file, [*command, str(several)], RANK=1, WORLD_SIZE=2)
    assert ended(process, 100) == -signal.SIGKILL
    pieces = several / "pieces"
    kept = {path: path.stat().st_mtime_ns for path in pieces.glob("0*.npy")}
    assert [path.name[:8] for path in kept] == ["0000001-"]  # of 1 and 3, which are rank 1's
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


def killed_at_an_event(number, folder, command):
    """A command that is killed when it is about to do this one of all that it does to files of a folder."""
    left = iter(range(number))

    def hook(event, args):
        of_files = event == "open" or event.startswith(("os.", "shutil."))
        if of_files and args and str(args[0]).startswith(folder) and next(left, None) is None:
            killed()

    sys.addaudithook(hook)
    main(command)


@pytest.mark.parametrize(
    "options", [["--num", "9", "--rule", "mixture"], pytest.param(["--per-member", "4"], marks=pytest.mark.full)]
)
def test_a_job_that_is_killed_at_random_events_ends_with_the_same_bytes(options, folders, tmp_path):
    """On one to three ranks, which live longer and longer, until the first one comes to its end."""
    alone, several = tmp_path / "alone", tmp_path / "several"
    common = ["--batch", "2", "--steps", "2", "--device", "cpu", "--quiet", "--timeout", "60"]
    command = ["sample", *folders, *options, *common, "--out"]
    assert ended(started(main, [*command, str(alone)]), 100) == 0
    chance, lives, first = random.Random(0), 10, None
    while first != 0:
        size = chance.choice([1, 2, 3])
        ranks = [
            started(
                killed_at_an_event,
                chance.randrange(lives),
                str(several),
                [*command, str(several)],
                RANK=rank,
                WORLD_SIZE=size,
            )
            for rank in range(size)
        ]
        first, *others = (ended(rank, 100) for rank in ranks)
        assert {first, *others} <= {0, -signal.SIGKILL}
        lives += lives // 2
    assert lives > 30  # three times at least
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
    assert sorted(path.name[:8] for path in tmp_path.glob("0*.npy")) == ["0000000-", "0000002-"]


def test_a_part_that_was_not_written_whole_is_made_again(tmp_path):
    (tmp_path / f".{2**22 + 1}.1.partial.0000000.npy").write_bytes(b"half")  # a process that is no more
    made = Pieces(tmp_path, {}).make(Job(), 1, lambda _: torch.ones(2).numpy())
    assert made[0].tolist() == [1, 1]


def test_a_rank_that_comes_late_to_a_job_that_is_done_leaves_nothing(tmp_path, monkeypatch):
    """All its pieces were there from the run before, so that the first rank did not wait for it."""
    folder, result = tmp_path / "pieces", tmp_path / "result.json"
    early = Pieces(folder, {"seed": 0}, [result])
    late = Pieces(folder, {"seed": 0}, [result])
    Pieces(folder, {"seed": 0}).make(Job(), 2, np.ones)
    write_json(result, {"job": early.job})
    early.remove()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    for pieces in (late, Pieces(folder, {"seed": 0}, [result])):
        assert pieces.make(Job(), 2, np.ones) is None
        assert not folder.exists()
    another = Pieces(folder, {"seed": 1}, [result])
    assert another.made() is None
    assert folder.exists()


def test_a_job_that_is_done_is_not_done_again(folders, tmp_path, monkeypatch, capsys):
    command = ["sample", *folders, "--num", "2", "--steps", "1", "--device", "cpu", "--quiet", "--json", "--out"]
    main([*command, str(tmp_path)])
    said = capsys.readouterr().out
    monkeypatch.setattr(Pieces, "make", None)
    main([*command, str(tmp_path)])
    assert capsys.readouterr().out == said


CALLED = []  # of whom; in the network itself it would be what its results depend on


class Shrinks(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, x, t):
        CALLED.append(self)
        return self.factor * x


def test_ranks_share_the_parts_of_an_evaluation_and_its_numbers_are_those_of_one(tmp_path, monkeypatch):
    def run(cache):
        denoiser = Denoiser(Shrinks(), fastens.schedules.VP(), "epsilon")
        samples = sample(denoiser, 7, (1, 2, 2), steps=3, batch_size=2, cache=cache)
        options = dict(levels=None, method="euler", steps=2, batch_size=2, cache=cache)
        return samples, likelihood(denoiser, samples, **options), CALLED.count(denoiser.model)

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
