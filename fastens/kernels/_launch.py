"""How kernels follow one another: each is launched while the one before ends, and waits for it where it begins.

The way to a kernel's first instruction (blocks placed, parameters and constants fetched, barriers made) takes about as
long as a small layer's products. On Hopper and later it is beside the end of the kernel before, in a CUDA graph too.
Set ``FASTENS_OVERLAP=0`` to launch each behind the end of the one before.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl  # noqa: F401 - the interpreter looks for it where a function is defined
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.language.target_info import cuda_capability_geq, current_target

from fastens.kernels._rows import interpreting


@triton.jit
def wait_for_previous():
    """Let the next kernel be launched once all blocks of this have begun, then wait until the ones before have ended.

    It is the first statement of a kernel: what is read before it may not be written yet, what is written before it may
    still be read.
    """
    if cuda_capability_geq(9, 0):
        gdc_launch_dependents()
        gdc_wait()


class Kernel:
    """What ``triton.jit`` makes of a kernel that begins with :func:`wait_for_previous`, launched accordingly."""

    def __init__(self, function: Callable[..., None], **options: Any) -> None:
        self._compiled = triton.jit(function, **options)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        """What launches it, as of ``triton.jit``."""
        return functools.partial(self._compiled[grid], **_options())


def kernel(function: Callable[..., None] | None = None, **options: Any) -> Any:
    """As ``triton.jit``, for a kernel that begins with :func:`wait_for_previous`."""
    return functools.partial(Kernel, **options) if function is None else Kernel(function, **options)


def _options() -> dict[str, bool]:
    if interpreting() or os.environ.get("FASTENS_OVERLAP") == "0":
        return {}
    target = current_target()
    return {"launch_pdl": True} if target is not None and target.backend == "cuda" and target.arch >= 90 else {}
