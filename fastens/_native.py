"""The only place that loads the compiled libraries: the CPU ops and the forest.

A prebuilt library is looked for in the package, then in the user's cache (where :func:`build` puts one if the package
folder is not writable). Nothing is compiled at import: where no library is found, the reference kernels serve and the
cause is kept for :func:`status` and for the errors of ``backend="native"``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.machinery
import importlib.util
import os
import pathlib
from collections.abc import Callable
from types import ModuleType

import torch

from fastens import _build

PACKAGE_DIR = pathlib.Path(__file__).resolve().parent / "_lib"


def cache_dir() -> pathlib.Path:
    """Return the folder of this source version's library in the user's cache (``$XDG_CACHE_HOME/fastens/...``).

    Raises:
        fastens._build.BuildError: this installation carries no C++ sources, so it cannot have cached a build of them.
    """
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "fastens" / _build.fingerprint()


def load() -> bool:
    """Load the library once per process; return whether it is loaded."""
    return _load() is None


def status() -> str:
    """Return "available", or why the library is not."""
    return _load() or "available"


def forest() -> ModuleType | None:
    """Return the compiled forest module, or None where it is not available."""
    return _forest()[0]


def forest_status() -> str:
    """Return "available", or why the forest module is not."""
    return _forest()[1] or "available"


@functools.cache
def has_kernel(op: str) -> bool:
    """Return whether the private op ``fastens::<op>`` has a compiled CPU kernel, loading the library first."""
    return load() and torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"fastens::{op}", "CPU")


def build(out_dir: pathlib.Path | None = None, verbose: bool = False) -> pathlib.Path:
    """Compile the CPU library and return its path; it is loaded by the next process.

    Args:
        out_dir: by default the package's folder, or the user's cache where that is not writable.
        verbose: print the compiler's commands.

    Raises:
        fastens._build.BuildError: no compiler, no ninja, no sources, or a compile error.
    """
    return _build.build_cpu(_out_dir() if out_dir is None else out_dir, verbose)


def build_forest(out_dir: pathlib.Path | None = None, verbose: bool = False) -> pathlib.Path:
    """Compile the forest module and return its path; as :func:`build`."""
    return _build.build_forest(_out_dir() if out_dir is None else out_dir, verbose)


def _out_dir() -> pathlib.Path:
    return PACKAGE_DIR if os.access(PACKAGE_DIR.parent, os.W_OK) else cache_dir()


@functools.cache
def _load() -> str | None:
    """Load the first CPU library that loads; return None, or the causes."""
    return _first(_build.LIBRARY_NAME, torch.ops.load_library)


@functools.cache
def _forest() -> tuple[ModuleType | None, str | None]:
    """Load the first forest module that loads; return it, and the causes where there is none."""
    modules: list[ModuleType] = []

    def load_module(path: pathlib.Path) -> None:
        loader = importlib.machinery.ExtensionFileLoader("fastens._forest", str(path))
        spec = importlib.util.spec_from_loader(loader.name, loader)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
        modules.append(module)

    causes = _first(_build.FOREST_NAME, load_module)
    return (modules[0] if modules else None), causes


def _first(name: str, load_library: Callable[[pathlib.Path], object]) -> str | None:
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
    try:
        remedy = f"a compiler is at hand ({_build.compiler()}): run `python -m fastens._native`"
    except _build.BuildError as error:
        remedy = str(error)
    return f"{'; '.join(causes)}; {remedy}"


if __name__ == "__main__":
    print(build(verbose=True))
    print(build_forest(verbose=True))
