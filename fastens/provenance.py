"""Where a result comes from: what was run, by which versions, on which device, from which checkpoints."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import platform
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from fastens._version import __version__
from fastens.device import device_of

_PACKAGES = ("torch", "numpy", "diffusers", "scikit-learn")


def provenance(checkpoints: Iterable[str | Path] = (), *, device: Any = "cpu", seed: int | None = None) -> dict:
    """Return what made a result, for the file saved beside it: command, versions, device, seeds, hashes.

    Args:
        checkpoints: files and folders; each file in them is named with its SHA-256.
        device: the computation ran on.
        seed: of all noise.
    """
    program = Path(sys.argv[0]).name.replace("__main__.py", "fastens")  # of python -m
    packages = {name: _version(name) for name in _PACKAGES}
    on = device_of(device)
    record: dict[str, Any] = {
        "command": shlex.join([program, *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {
            "fastens": __version__,
            "python": platform.python_version(),
            **{name: version for name, version in packages.items() if version is not None},
        },
        "device": on.name if on.launches else str(device),
        "threads": torch.get_num_threads(),
    }
    if seed is not None:
        record["seed"] = seed
    paths = [Path(path) for path in checkpoints]
    if paths:
        record["checkpoints"] = [{"path": _shown(path), "sha256": digests(path)} for path in paths]
    return record


def _shown(path: Path) -> str:
    """From the working folder where the path lies in it: a report can be given away without the names around it."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def digests(path: Path) -> dict[str, str]:
    """SHA-256 of a file, or of each file in a folder, by its name."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return {(p.relative_to(path) if p != path else Path(p.name)).as_posix(): _sha256(p) for p in files}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
