"""The only place that loads the compiled libraries, of the CPU and of CUDA.

A prebuilt library is looked for in the package (in ``$FASTENS_LIB`` where), then in the user's cache
(where :func:`build` puts one if the package folder is not writable). Nothing is compiled at import: where no library is
found, the reference kernels serve and the cause is kept for :func:`status` and for the errors of ``backend="native"``.
The CUDA library is loaded only where torch has CUDA: its undefined symbols are those of torch's own CUDA library.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import pathlib
import sys
from collections.abc import Callable

import torch

from fastens import _build
from fastens.device import lacking

PACKAGE_DIR = pathlib.Path(os.environ.get("FASTENS_LIB") or pathlib.Path(__file__).resolve().parent / "_lib")


_loaded: dict[str, pathlib.Path] = {}


def cache_dir() -> pathlib.Path:
    """Return the folder of this source version's library in the user's cache (``$XDG_CACHE_HOME/fastens/...``).

    Raises:
        fastens._build.BuildError: this installation carries no C++ sources, so it cannot have cached a build of them.
    """
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "fastens" / _build.fingerprint()


def load(device: str = "cpu") -> bool:
    """Load the library of a device type, "cpu" or "cuda", once per process; return whether it is loaded."""
    return _load(device) is None


def status(device: str = "cpu") -> str:
    """Return "available", or why the library of a device type is not."""
    return _load(device) or "available"


@functools.cache
def functions() -> ctypes.PyDLL | None:
    """Return the CPU library's C functions, for what works on NumPy arrays, or None where it is not available."""
    return ctypes.PyDLL(str(_loaded["cpu"])) if load() else None


@functools.cache
def has_kernel(op: str, device: str = "cpu") -> bool:
    """Return whether the private op ``fastens::<op>`` has a compiled kernel for a device type, loading the library."""
    return load(device) and torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"fastens::{op}", device.upper())


def build(out_dir: pathlib.Path | None = None, verbose: bool = False, device: str = "cpu") -> pathlib.Path:
    """Compile the library of a device type and return its path; it is loaded by the next process.

    Args:
        out_dir: by default the package's folder, or the user's cache where that is not writable.
        verbose: print the compiler's commands.
        device: "cpu" or "cuda".

    Raises:
        fastens._build.BuildError: no compiler, no ninja, no sources, or a compile error.
    """
    return _build.build(device, _out_dir() if out_dir is None else out_dir, verbose)


def _out_dir() -> pathlib.Path:
    return PACKAGE_DIR if os.access(PACKAGE_DIR.parent, os.W_OK) else cache_dir()


@functools.cache
def _load(device: str = "cpu") -> str | None:
    """Load the first library of a device type that loads; return None, or the causes."""
    why = lacking(device)
    if why is not None:
        return why

    def load_library(path: pathlib.Path) -> None:
        torch.ops.load_library(path)
        _loaded[device] = path

    return _first(_build.LIBRARY_NAMES[device], load_library, device)


def _first(name: str, load_library: Callable[[pathlib.Path], object], device: str = "cpu") -> str | None:
    folders = [PACKAGE_DIR]
    with contextlib.suppress(_build.BuildError):
        folders.append(cache_dir())
    causes = []
    for folder in folders:
        path = folder / name
        if not path.is_file():
            causes.append(f"no {path}")
            continue
        try:
            load_library(path)
        except (OSError, ImportError) as error:
            causes.append(f"{path} does not load: {error}")
            continue
        return None
    which = "" if device == "cpu" else f" {device}"
    try:
        tool = _build.compiler() if device == "cpu" else _build.nvcc()
        remedy = f"a compiler is at hand ({tool}): run `python -m fastens._native{which}`"
    except _build.BuildError as error:
        remedy = str(error)
    return f"{'; '.join(causes)}; {remedy}"


if __name__ == "__main__":
    print(build(None, True, *sys.argv[1:2]))
