"""The folder of a run: its snapshots, and of each the weights and their averages, as members."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from fastens.checkpoints import load_members
from fastens.network.stacking import tensors_of
from fastens.raw import raw

_FILES = frozenset((".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".pkl"))
_NO_SNAPSHOT = re.compile(
    r"(optim|scheduler|sampler|scaler|random_states|rng|training[-_](args|state)|dl_state|custom_checkpoint|zero_pp)"
    r"|-\d{5}-of-\d{5}\."
)


def snapshots(folder: Path) -> list[Path]:
    """Return the snapshots in a folder, in order: names that differ in numbers only, at least two; else none.

    Of several such names that of the most is taken, folders before files: ``checkpoint-500``, ``checkpoint-1000``.
    """
    kinds: dict[tuple[bool, str], list[Path]] = {}
    for path in folder.iterdir():
        told, pattern = path.is_dir(), re.sub(r"\d+(\.\d+)?", "#", path.name)
        if "#" in pattern and not _NO_SNAPSHOT.search(path.name) and (told or path.suffix in _FILES):
            kinds.setdefault((told, pattern), []).append(path)
    found = max(kinds.items(), key=lambda item: (len(item[1]), item[0][0]), default=(None, []))[1]
    in_order = sorted(found, key=lambda path: [float(part) for part in re.findall(r"\d+(?:\.\d+)?", path.name)])
    return in_order if len(found) > 1 else []


class RunMembers(Sequence[nn.Module]):
    """A run's snapshots as members, read when they are asked for: weights, and averages where there are both.

    Args:
        paths: of the snapshots.
        factory: makes a member without its weights; none where checkpoints describe their network.
        raw: only the weights.
        **reading: as :func:`fastens.load_members` takes it.

    Attributes:
        names: of the members.

    Raises:
        ValueError, OSError: as :func:`fastens.load_members`, of the first snapshot that cannot be read.
    """

    def __init__(self, paths: Sequence[Path], factory: Any = None, raw: bool = False, **reading: Any) -> None:
        self._averages = None if raw else load_members(paths, factory, True, **reading)
        self._weights = load_members(paths, factory, False, **reading)
        self._places: list[tuple[Any, int]] = []
        self.names: list[str] = []
        for k, path in enumerate(paths):
            there: dict[str, tuple[str, Any]] = {}
            for which, source in self._sources():
                try:
                    there.setdefault(_digest(source[k]), (which, source))
                except ValueError:
                    if which == "average" or not there:
                        raise
            for which, source in there.values():
                self._places.append((source, k))
                self.names.append(path.stem + (f" ({which})" if len(there) > 1 else ""))

    def _sources(self) -> Iterator[tuple[str, Any]]:
        if self._averages is not None:
            yield "average", self._averages
        yield "weights", self._weights

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, k: Any) -> Any:
        if isinstance(k, slice):
            return [self[i] for i in range(*k.indices(len(self)))]
        source, place = self._places[k]
        return source[place]


def _digest(member: nn.Module) -> str:
    total = hashlib.sha256()
    for tensor in tensors_of(member).values():
        total.update(raw(tensor).cpu().numpy().data)
    return total.hexdigest()
