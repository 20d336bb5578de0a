"""Work in numbered pieces, shared among the ranks of a job: finished pieces stay on disk, and one rank joins them.

A piece is a file that is there whole or not at all, and is the same whoever makes it. So ranks agree on nothing while
they work; a job that was stopped, on however many ranks, is started again and makes what is missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastens.device import gpu
from fastens.files import partial, whole, write_json

MANIFEST = "manifest.json"


class Job:
    """This process's rank in a job: as ``torchrun`` started it, or a job of one.

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
        """Return this process's GPU on its machine, None without GPUs or in a job of one."""
        found = None if self.size == 1 else gpu(int(os.environ.get("LOCAL_RANK", 0)))
        return None if found is None else str(found.where)

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
        result: the files that are made of all pieces, the last of them JSON that has :attr:`job` and is written last.

    Attributes:
        job: a digest of the identity.

    Raises:
        ValueError: the folder holds the pieces of another job.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], result: Sequence[Path] = ()) -> None:
        self.folder, self._result = folder, result
        text = json.dumps(identity, sort_keys=True, default=str)
        self.job = hashlib.sha256(text.encode()).hexdigest()[:16]
        wanted, found = json.loads(text), _read(folder / MANIFEST)
        if found is None:
            if self.made() is None:  # asked in this order: pieces are removed once the result is there
                write_json(folder / MANIFEST, wanted)
        elif found != wanted:
            differing = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
            raise ValueError(
                f"{folder} holds pieces of another job: {', '.join(differing)} differ; take another --out, or remove "
                "that folder"
            )

    def made(self) -> dict[str, Any] | None:
        """Return the content of the result's last file if this job wrote the whole result, else None."""
        if not self._result or not all(path.exists() for path in self._result):
            return None
        found = _read(self._result[-1])
        return found if found is not None and found.get("job") == self.job else None

    def path(self, piece: int) -> Path:
        """The file of a piece; its name is of no other job, wherever such a file was left."""
        return self.folder / f"{piece:07}-{self.job}.npy"

    def make(
        self, job: Job, count: int, run: Callable[[int], np.ndarray], done: Callable[[int], object] = lambda _: None
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
        for piece in filter(job.mine, range(count)):
            if not self.path(piece).exists() and self.made() is None:
                array = run(piece)
                if self.made() is None:  # else the first rank found all there and has come to its end
                    with whole(self.path(piece)) as (place,):
                        np.save(place, array)
            if job.first:
                done(len(self._there(count)))
        if not job.first:
            return None
        self._wait(job, count, done)
        return [np.load(self.path(piece)) for piece in range(count)]

    def _there(self, count: int) -> set[int]:
        names = {path.name for path in self.folder.iterdir()}
        return {piece for piece in range(count) if self.path(piece).name in names}

    def _wait(self, job: Job, count: int, done: Callable[[int], object]) -> None:
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
        """Remove the folder, once the result is there; a part of it is never found by another job."""
        gone = partial(self.folder)
        with contextlib.suppress(FileNotFoundError):
            self.folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
