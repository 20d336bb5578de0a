"""Work in numbered pieces over the ranks of a job: each takes its own, what is written stays, and one makes the whole.

A piece is a file that is there whole or not at all, and is the same whoever makes it. So ranks agree on nothing while
they work; a job that was stopped, on however many ranks, is started again and makes what is missing.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastens.files import whole, write_json

MANIFEST = "manifest.json"


class Job:
    """This process among those of a job: as ``torchrun`` started it, or alone.

    Args:
        timeout: seconds in which some rank must have finished a piece, else the job is given up.

    Attributes:
        rank: of this process.
        size: how many there are.
    """

    def __init__(self, timeout: float = 1800.0) -> None:
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.timeout = timeout

    @property
    def first(self) -> bool:
        """Whether this process makes the whole of the pieces."""
        return self.rank == 0

    @property
    def device(self) -> str | None:
        """The GPU of this process among those of its machine; none where there is none, or nobody else."""
        if self.size == 1 or not torch.cuda.is_available():
            return None
        return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"

    def mine(self, piece: int) -> bool:
        """Whether a piece is this rank's."""
        return piece % self.size == self.rank


def from_own_place(pieces: Sequence[Any]) -> list[Any]:
    """Pieces in the order in which a rank makes those that are not there: each begins elsewhere and goes round.

    So ranks share work whose results are kept where all see them, wait for nobody, and do what a lost one did not.
    """
    job = Job()
    start = job.rank * len(pieces) // job.size
    return [*pieces[start:], *pieces[:start]]


class Pieces:
    """Arrays in files of a folder, under a manifest that says what they are pieces of.

    Args:
        folder: of the files.
        identity: all that decides what is in them, JSON-able; another job's folder is refused.

    Raises:
        ValueError: the folder holds the pieces of another job.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder = folder
        wanted = json.loads(json.dumps(identity, sort_keys=True, default=str))
        found = self._manifest()
        if found is None:
            write_json(folder / MANIFEST, wanted)
        elif found != wanted:
            differing = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
            raise ValueError(
                f"{folder} holds pieces of another job: {', '.join(differing)} differ; take another --out, or remove "
                "that folder"
            )

    def _manifest(self) -> Any:
        try:
            return json.loads((self.folder / MANIFEST).read_text())
        except (OSError, ValueError):
            return None

    def path(self, piece: int) -> Path:
        """The file of a piece."""
        return self.folder / f"{piece:07}.npy"

    def make(
        self, job: Job, count: int, run: Callable[[int], np.ndarray], done: Callable[[int], None] = lambda _: None
    ) -> list[np.ndarray] | None:
        """Make the pieces that are this rank's and are not there; on the first rank, wait for all and return them.

        Args:
            job: this process among others.
            count: how many pieces there are.
            run: makes one.
            done: told how many are there, on the first rank.

        Raises:
            TimeoutError: no rank finished a piece in the job's ``timeout``; names those that are missing.
        """
        self._remove_partials(job)
        for piece in filter(job.mine, range(count)):
            if not self.path(piece).exists():
                array = run(piece)
                with whole(self.path(piece)) as (partial,):
                    np.save(partial, array)
            if job.first:
                done(len(self._there(count)))
        if not job.first:
            return None
        self._wait(job, count, done)
        return [np.load(self.path(piece)) for piece in range(count)]

    def _there(self, count: int) -> set[int]:
        names = {path.name for path in self.folder.iterdir()}
        return {piece for piece in range(count) if self.path(piece).name in names}

    def _wait(self, job: Job, count: int, done: Callable[[int], None]) -> None:
        before, since = -1, time.monotonic()
        while (there := self._there(count)) != set(range(count)):
            if len(there) != before:
                before, since = len(there), time.monotonic()
                done(before)
            if time.monotonic() - since > job.timeout:
                missing = sorted(set(range(count)) - there)
                ranks = sorted({piece % job.size for piece in missing})
                raise TimeoutError(
                    f"{len(missing)} of {count} pieces are missing, of rank {', '.join(map(str, ranks))}, and none "
                    f"came in {job.timeout:g} s: start the job again, it goes on from what is in {self.folder}"
                )
            time.sleep(0.05)
        done(count)

    def remove(self) -> None:
        """Remove the folder, once its pieces are in a whole."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _remove_partials(self, job: Job) -> None:
        """Remove what a killed process of an earlier run was writing."""
        if job.first:
            for path in self.folder.glob(".*.partial.*"):
                pid = path.name.split(".")[1]
                if pid.isdigit() and not Path(f"/proc/{pid}").exists():
                    path.unlink(missing_ok=True)
