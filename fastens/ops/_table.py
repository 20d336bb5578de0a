"""Measurements of the ways to compute an op, in a file that several processes read and add to.

The file is JSON: device -> op -> key -> entry, an entry being
``{"chosen": way, "seconds": {way: median}, "failed": {way: why}, "torch": version}``. Tables that the package ships
(``fastens/ops/measured/*.json``) are read first; what is measured here is added to the user's, ``choices.json`` in
``$FASTENS_CACHE`` (by default ``$XDG_CACHE_HOME/fastens``), and wins over them. What is in neither shape is no
measurement: it can be measured again.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from fastens.files import write_json

Entry = dict[str, Any]
Measurements = dict[str, dict[str, dict[str, Entry]]]
SHIPPED = pathlib.Path(__file__).resolve().parent / "measured"


class Table:
    """Measurements by device, op and key, kept in a file that several processes may add to.

    Args:
        path: the file; none for :func:`user_table`, established at the first use.
        shipped: folder of tables that are only read.
    """

    def __init__(self, path: pathlib.Path | None = None, shipped: pathlib.Path = SHIPPED) -> None:
        self._path = path
        self._shipped = shipped
        self._content: Measurements | None = None

    @property
    def path(self) -> pathlib.Path:
        """The file that measurements are added to."""
        return self._path or user_table()

    @property
    def content(self) -> Measurements:
        """All that is known: device -> op -> key -> entry."""
        if self._content is None:
            content: Measurements = {}
            for path in (*sorted(self._shipped.glob("*.json")), self.path):
                _merge(content, _read(path))
            self._content = content
        return self._content

    def find(self, device: str, op: str, key: str) -> Entry | None:
        """Return what was measured, or none."""
        return self.content.get(device, {}).get(op, {}).get(key)

    def add(self, device: str, op: str, key: str, entry: Entry) -> None:
        """Keep a measurement, in the file too where that can be written; what others wrote there meanwhile stays."""
        added = {device: {op: {key: entry}}}
        _merge(self.content, added)
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _one_at_a_time(self.path.parent):
                stored = _read(self.path)
                _merge(stored, added)
                write_json(self.path, stored, sort_keys=True)

    def summary(self) -> dict[tuple[str, str], dict[str, int]]:
        """How often each way was chosen: (device, op) -> way -> number of keys."""
        counts: dict[tuple[str, str], dict[str, int]] = {}
        for device, ops in self.content.items():
            for op, entries in ops.items():
                chosen = [entry["chosen"] for entry in entries.values()]
                counts[device, op] = {way: chosen.count(way) for way in sorted(set(chosen))}
        return counts


TABLE = Table()


def user_table() -> pathlib.Path:
    """The file of the user's measurements."""
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(os.environ.get("FASTENS_CACHE") or pathlib.Path(cache) / "fastens") / "choices.json"


@contextlib.contextmanager
def _one_at_a_time(folder: pathlib.Path) -> Iterator[None]:
    """Hold an inter-process lock on a folder; without effect where the file system has no locks.

    The folder itself is locked: a file beside the table would be one more to explain.
    """
    with contextlib.ExitStack() as held:
        with contextlib.suppress(ImportError, OSError):  # no POSIX, or a file system without locks
            import fcntl

            descriptor = os.open(folder, os.O_RDONLY)
            held.callback(os.close, descriptor)  # which unlocks it
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


def _read(path: pathlib.Path) -> Measurements:
    """Read the measurements in a file; empty where there is none or it is damaged."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return {
        device: {
            op: {key: entry for key, entry in _items(entries) if isinstance(dict(_items(entry)).get("chosen"), str)}
            for op, entries in _items(ops)
        }
        for device, ops in _items(content)
    }


def _items(x: Any) -> list[tuple[str, Any]]:
    """The items of a dict; none of what should be one and is not."""
    return list(x.items()) if isinstance(x, dict) else []


def _merge(into: Measurements, other: Measurements) -> None:
    for device, ops in other.items():
        for op, entries in ops.items():
            into.setdefault(device, {}).setdefault(op, {}).update(entries)
