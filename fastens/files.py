"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def partial(path: Path) -> Path:
    """Return a temporary path beside a file or folder, unique to this thread, with the same suffix."""
    return path.with_name(f".{os.getpid()}.{threading.get_ident()}.partial.{path.name}")


@contextlib.contextmanager
def whole(path: Path, *more: Path) -> Iterator[list[Path]]:
    """Write files to temporary paths, and move all into place once the last is complete and on the disk.

    Of several files the last one says that the others are there: it is taken away before they change, so that an
    interruption leaves either the former files, or the new ones, or no last one.

    Args:
        path: of a file; its folder is made where it is missing.
        *more: of further files that belong to it.

    Yields:
        Paths in the same folder, with the same suffixes, that are to be written.

    Raises:
        OSError: the folder cannot be written, or the disk is full; what was there before is kept.
    """
    paths = (path, *more)
    partials = [partial(path) for path in paths]
    try:
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
        yield partials
        for each in partials:
            descriptor = os.open(each, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        if len(paths) > 1:
            paths[-1].unlink(missing_ok=True)
        for each, path in zip(partials, paths, strict=True):
            os.replace(each, path)
    except OSError as error:
        why = error.strerror or str(error)
        raise OSError(f"{paths[-1]} cannot be written: {why}; nothing half-written was left") from error
    finally:
        for each in partials:
            with contextlib.suppress(OSError):
                each.unlink(missing_ok=True)


def remove_partials(folder: Path) -> None:
    """Remove what killed processes were writing into a folder; for the one process that writes there now."""
    for path in folder.glob(".*.partial.*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file so that, whatever happens, it holds all of ``content`` or does not exist in this version.

    Raises:
        OSError: as :func:`whole`.
    """
    with whole(path) as (place,):
        place.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, data: Any, **options: Any) -> None:
    """Write JSON atomically; ``options`` are those of :func:`json.dumps`."""
    write_whole(path, json.dumps(data, **{"indent": 1, **options}) + "\n")


def check_writable(out: Path) -> None:
    """Raise before any work is done if the output folder cannot be written.

    Raises:
        OSError: the folder cannot be made, or holds no new file.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):  # which has no name that another process might take away
            pass
    except OSError as error:
        raise OSError(
            f"the output folder {out} cannot be written: {error.strerror}; choose another with --out"
        ) from error
