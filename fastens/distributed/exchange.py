"""What ranks tell each other in a call: bytes in a fixed order, and whether all are well and in the same call."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastens.raw import raw

_REPORTING = 3.0  # seconds in which those that live say so, once a collective failed


class RanksDiffer(RuntimeError):
    """Ranks hold, or are called with, different things."""


class RankLost(RuntimeError):
    """A rank died, failed or did not answer in time."""


class Exchange:
    """The collectives of one axis of a mesh, or of all of it.

    There is one primitive, an all-to-all of bytes: sums are added up by who receives their parts, in the order of the
    ranks, and no library's choice of an algorithm enters a result.

    Args:
        group: of the ranks.
        timeout: seconds that a rank is waited for.

    Attributes:
        sent: bytes that this rank has sent to others, in data.
    """

    def __init__(self, group: dist.ProcessGroup, timeout: float) -> None:
        self.group, self.timeout, self.sent = group, timeout, 0
        self.ranks = dist.get_process_group_ranks(group)
        self.size, self.rank = len(self.ranks), dist.get_rank(group)
        self._failures = 0

    def all_to_all(self, parts: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Send part j to rank j; return what rank j sent, of ``shapes[j]`` and the parts' dtype, in their order."""
        if self.size == 1:
            return [parts[0]]
        dtype, device = parts[0].dtype, parts[0].device
        given = [raw(part) for part in parts]
        item = parts[0].element_size()
        lengths = [item * torch.Size(shape).numel() for shape in shapes]
        received = torch.empty(sum(lengths), dtype=torch.uint8, device=device)
        sizes = [len(each) for each in given]
        self._wait(
            lambda: dist.all_to_all_single(received, torch.cat(given), lengths, sizes, group=self.group, async_op=True)
        )
        self.sent += sum(sizes) - sizes[self.rank]
        return [x.view(dtype).reshape(tuple(s)) for x, s in zip(received.split(lengths), shapes, strict=True)]

    def gather(self, own: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """What every rank has, in their order, where rank j has ``shapes[j]``."""
        return self.all_to_all([own] * self.size, shapes)

    def agree(self, facts: Sequence[int]) -> Tensor:
        """The facts of every rank, int64 [ranks, n]; they are on the CPU, as the group is."""
        own = torch.tensor(facts, dtype=torch.int64)
        found = [torch.empty_like(own) for _ in range(self.size)]
        self._wait(lambda: dist.all_gather(found, own, group=self.group, async_op=True))
        return torch.stack(found)

    def objects(self, own: Any) -> list[Any]:
        """What every rank says, picklable."""
        found: list[Any] = [None] * self.size
        self._guarded(lambda: dist.all_gather_object(found, own, group=self.group))
        return found

    def from_first(self, values: Tensor) -> Tensor:
        """Broadcast the first rank's values."""
        values = values.clone()
        self._wait(lambda: dist.broadcast(values, self.ranks[0], group=self.group, async_op=True))
        return values

    def _wait(self, start: Callable[[], Any]) -> None:
        def run() -> None:
            work = start()
            if work is not None:
                work.wait(datetime.timedelta(seconds=self.timeout))

        self._guarded(run)

    def _guarded(self, run: Callable[[], Any]) -> None:
        try:
            run()
        except RuntimeError as error:
            lost = self._lost()
            who = f"rank {', '.join(map(str, lost))} of {self.ranks}" if lost else f"one of the ranks {self.ranks}"
            raise RankLost(
                f"{who} did not answer within {self.timeout:g} s: it died, failed or is slow. Start the job again, "
                f"e.g. under torchrun --max-restarts, or allow more by timeout= ({str(error).splitlines()[0]})"
            ) from error

    def _lost(self) -> list[int]:
        """Return the ranks that do not report after a failed collective, None where the store is lost too."""
        self._failures += 1
        try:
            store = dist.distributed_c10d._get_default_store()
            key = f"fastens/{'-'.join(map(str, self.ranks))}/failure{self._failures}"
            store.set(f"{key}/{dist.get_rank()}", "alive")
            end = time.monotonic() + _REPORTING
            lost = list(self.ranks)
            while lost and time.monotonic() < end:
                lost = [rank for rank in lost if not store.check([f"{key}/{rank}"])]
                time.sleep(0.05)
            return lost
        except Exception:  # it was in the process that died
            return []


def split(count: int, parts: int) -> list[int]:
    """Split a count into parts of nearly equal size; the first parts get one more each."""
    return [count // parts + (i < count % parts) for i in range(parts)]
