"""Processes forked from one that has imported everything, once; and ranks of a world among them, which run cases."""

import datetime
import multiprocessing
import os
import signal
import sys
import time
import traceback
from multiprocessing import connection

import torch.distributed as dist

from tests.distributed.cases import OF_SEVERAL
from tests.distributed.kind_cases import CASES

WORLDS = (1, 2, 4)
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.distributed.imported"])


def cases_of(world):
    """Their names."""
    return [name for name in CASES if world > 1 or name not in OF_SEVERAL]


def started(run, *args, **environment):
    """A process of ``run(*args)``, whose result is its exit code.

    Args:
        run: function of a module.
        *args: its arguments.
        **environment: variables of the process's own.
    """
    process = _FORKS.Process(target=_run, args=(run, args, environment), daemon=True)
    process.start()
    return process


def _run(run, args, environment):
    from tests.distributed import imported

    assert os.getpid() != imported.PROCESS, "nothing was imported beforehand: start pytest in the repository's root"
    os.environ.update({name: str(value) for name, value in environment.items()})
    sys.exit(run(*args))


class World:
    """Ranks of one process group after another, a new one for each case.

    A rank that fails, dies or does not end in time is told of by :meth:`run`; then all are ended, since those that
    live may be waiting for it, and whoever wants to go on takes another world.

    Args:
        size: how many ranks.
        folder: for files by which they find each other.
    """

    def __init__(self, size, folder):
        self.size, self.folder, self.cases, self.alive = size, folder, 0, True
        self.pipes, self.ranks = [], []
        for rank in range(size):
            ours, theirs = _FORKS.Pipe()
            self.ranks.append(started(_serve, theirs, size, rank))
            theirs.close()
            self.pipes.append(ours)

    def run(self, case, timeout=200.0, grace=10.0):
        """Run a case on every rank; return what failed, by rank.

        Args:
            case: function of a module, of the number of ranks.
            timeout: seconds that it may take.
            grace: seconds that others have to say how they fare, once one has failed.
        """
        self.cases += 1
        for pipe in self.pipes:
            pipe.send((case, f"file://{self.folder}/{self.size}-{self.cases}"))
        failed, waiting, end = {}, list(self.pipes), time.monotonic() + timeout
        while waiting and (ready := connection.wait(waiting, max(0.0, end - time.monotonic()))):
            for pipe in ready:
                waiting.remove(pipe)
                rank = self.pipes.index(pipe)
                if what := _said(pipe, self.ranks[rank]):
                    failed[rank] = what
                    end = min(end, time.monotonic() + grace)
        failed |= {self.pipes.index(pipe): "did not come to its end" for pipe in waiting}
        if failed:
            self.end()
        return failed

    def end(self):
        """End the ranks."""
        self.alive = False
        for rank in self.ranks:
            rank.kill()
        for rank in self.ranks:
            rank.join()


def _said(pipe, rank):
    try:
        return pipe.recv()
    except EOFError:
        rank.join()
        return f"died: {signal.Signals(-rank.exitcode).name if rank.exitcode < 0 else rank.exitcode}"


def _serve(pipe, world, rank):
    while True:
        try:
            case, store = pipe.recv()
        except EOFError:  # nobody is there to ask for more
            return
        try:
            minute = datetime.timedelta(seconds=60)
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=minute)
            case(world)
            dist.barrier()
            dist.destroy_process_group()
        except BaseException:
            pipe.send(traceback.format_exc())
            return
        pipe.send("")
