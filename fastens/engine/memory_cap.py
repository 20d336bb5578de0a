"""How many rows one folded pass takes: what was asked for, and what the memory holds."""

import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastens import reproducible
from fastens.device import release_memory

_SHARE = 0.75  # of the free memory for one pass; the rest is for buffers inside kernels and for fragmentation
_CLOSE = 64  # a pass is measured where module outputs times this exceed the free memory: they are not all there is
_CGROUPS = (  # limit, usage, statistics: version 2, then 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    *[tuple(f"/sys/fs/cgroup/memory/memory.{name}" for name in ("limit_in_bytes", "usage_in_bytes", "stat"))],
)


def available_memory() -> float:
    """Bytes that this process may still allocate in main memory, infinite where the system does not say.

    The least of what the system has free, what the control group leaves, and what the address space limit leaves.
    """
    free = [float("inf")]
    meminfo = _fields("/proc/meminfo")
    if "MemAvailable:" in meminfo:
        free.append(meminfo["MemAvailable:"] * 1024)
    for limit, usage, statistics in _CGROUPS:
        most, used = _number(limit), _number(usage)
        if most is not None and used is not None:
            free.append(most - used + _fields(statistics).get("inactive_file", 0))
    mapped = _number("/proc/self/statm")
    if mapped is not None:
        import resource  # of Unix, as /proc is

        address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
        if address_space != resource.RLIM_INFINITY:
            free.append(address_space - mapped * resource.getpagesize())
    return max(0.0, min(free))


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _number(path: str) -> int | None:
    words = _read(path).split()
    return int(words[0]) if words and words[0].isdigit() else None


def _fields(path: str) -> dict[str, int]:
    lines = [line.split() for line in _read(path).splitlines()]
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or in main memory."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(cause in text for cause in ("can't allocate memory", "bad_alloc"))
    )


@contextmanager
def suppress_out_of_memory() -> Iterator[None]:
    """Leave the block when an allocation fails in it."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise


class Allocations(TorchDispatchMode):
    """Adds up the memory that operations allocate while it is active.

    Attributes:
        peak: the most bytes at one time.
        total: all bytes, as if none were freed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.total = self._now = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self._meet(leaf, 0)
        result = func(*args, **kwargs)
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._meet(leaf, leaf.untyped_storage().nbytes())
        return result

    def _meet(self, tensor: Tensor, num_bytes: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return

        def freed(_: Any) -> None:
            del self._known[key]
            self._now -= num_bytes

        self._known[key] = weakref.ref(storage, freed)
        self._now += num_bytes
        self.total += num_bytes
        self.peak = max(self.peak, self._now)


class MemoryCap:
    """The most rows of a folded pass, for each kind of call.

    In main memory a pass that would not fit is foreseen, from what a row of a member's own pass was measured to need;
    where derivatives are wanted it is not, because all passes' activations are kept then. On every device a pass that
    runs out of memory is tried again with half its rows. A cap that was found is kept.

    Args:
        asked: the cap that the user set, or none.

    Attributes:
        of_all: K of all ranks, where each has some of the members.
    """

    def __init__(self, asked: int | None) -> None:
        self.asked = asked
        self.of_all: int | None = None
        self._told = False
        self.clear()

    def clear(self) -> None:
        """Forget what was measured and found."""
        self._found: dict[Hashable, int] = {}
        self._per_row: dict[Hashable, tuple[float, float]] = {}  # bytes at the peak, and in all

    def cuts(self, num_members: int, batch: int) -> bool:
        """Whether the user's cap cuts a call into passes; in deterministic mode on every rank as in one process."""
        counted = self.of_all if self.of_all is not None and reproducible.enabled() else num_members
        return self.asked is not None and counted * batch > self.asked

    def wants_measure(self, key: Hashable, num_members: int, batch: int, least: int, device: torch.device) -> bool:
        """Whether the members' passes together come near the free memory, so that what a row needs must be known.

        Args:
            key: the kind of call.
            num_members: K.
            batch: B.
            least: bytes that are known to be allocated in a member's pass: the outputs of its modules.
            device: where it runs.
        """
        known = device.type != "cpu" or key in self._per_row or batch == 0
        return not known and _CLOSE * num_members * least > available_memory()

    @contextmanager
    def measuring(self, key: Hashable, batch: int) -> Iterator[None]:
        """Measure what a row needs from the member's own pass of ``batch`` rows that runs meanwhile."""
        with Allocations() as allocations:
            yield
        self._per_row[key] = allocations.peak / batch, allocations.total / batch

    def rows(self, key: Hashable, total: int) -> int:
        """How many of ``total`` rows the next pass may take."""
        rows = total if self.asked is None else min(total, self.asked)
        rows = min(rows, self._found.get(key, rows))
        if key not in self._per_row:
            return rows
        per_row, free = max(1.0, self._per_row[key][0]), available_memory()
        fitting = max(1, int(_SHARE * free / per_row))
        if rows > fitting:
            self._found[key] = rows = fitting
            self._tell(
                f"{total} rows in one pass need about {total * per_row / 2**20:.0f} MiB and "
                f"{free / 2**20:.0f} MiB are free, so a pass takes {rows}"
            )
        return rows

    def holds_recording(self, key: Hashable, total: int) -> bool:
        """Whether a whole pass may be recorded, which keeps all that it allocates."""
        if self.rows(key, total) < total:
            return False
        return key not in self._per_row or total * self._per_row[key][1] <= _SHARE * available_memory()

    def run(self, key: Hashable, total: int, run_pass: Callable[[int, int], Any], whole: int = 1) -> list[Any]:
        """Run passes until all rows are done.

        Args:
            key: the kind of call.
            total: rows in all.
            run_pass: evaluates rows ``start`` to ``stop``.
            whole: rows that stay together, as those of one member where it takes batch statistics.

        Returns:
            What the passes returned.
        """
        compiling = torch.compiler.is_compiling()
        rows = (min(self.asked or total, total)) if compiling else self.rows(key, total)
        rows = max(rows // whole * whole, min(whole, total))
        if compiling:
            starts = [0] if rows == total else range(0, total, rows)
            return [run_pass(start, min(start + rows, total)) for start in starts]
        parts: list[Any] = []
        start = 0
        while start < total or not parts:
            stop = min(start + rows, total)
            try:
                parts.append(run_pass(start, stop))
                start = stop
                continue
            except (RuntimeError, MemoryError) as error:
                if stop - start <= whole or not is_out_of_memory(error):
                    raise
            # past the handler, which kept the tensors of the failed pass alive
            self.halve(key, stop - start)
            rows = max(whole, self._found[key] // whole * whole)
        return parts

    def halve(self, key: Hashable, failed: int) -> None:
        """Take half as many rows from now on as a pass that ran out of memory had."""
        self._found[key] = failed // 2
        self._tell(f"a pass of {failed} rows ran out of memory, so one takes {failed // 2}")
        release_memory()

    def _tell(self, what: str) -> None:
        if not self._told:
            self._told = True
            warnings.warn(f"fastens: {what}; results are the same, and max_fold sets the number", stacklevel=2)
