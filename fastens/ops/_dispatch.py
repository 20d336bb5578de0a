"""Which backend runs an op: the choice that every module of :mod:`fastens.ops` makes in the same way."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch

from fastens import _native

BACKENDS = ("reference", "native", "triton")

KERNEL_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True)
class Op:
    """One op of the registry.

    Attributes:
        name: basename of the op in every folder (``ops/<name>.py``, ``reference/<name>.py``, ...) and, as
            ``fastens::<name>``, the dispatcher name of its reference kernel.
        public: the public function.
        reference: the naive PyTorch function of the same signature, without ``backend``.
        kernels: (backend, dispatcher name) pairs of its other kernels, strongest first, for example
            ``(("native", "_aggregate_native"),)``.
    """

    name: str
    public: Callable[..., Any]
    reference: Callable[..., Any]
    kernels: tuple[tuple[str, str], ...] = ()


OPS: dict[str, Op] = {}


def register(op: Op) -> Op:
    """Add an op to the registry, so that the op suite tests it, and return it."""
    OPS[op.name] = op
    return op


def missing(kernel: str | None, backend: str, device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """Return None where ``backend`` can run the op on ``device``, or why it cannot.

    Args:
        kernel: dispatcher name of the op's kernel for this backend, or None where it has none.
        backend: "native" or "triton".
        device: where the tensors are.
        dtype: dtype of the tensors, or None where the op takes none.
    """
    if kernel is None:
        return f"this op has no {backend} kernel"
    if dtype is not None and dtype not in KERNEL_DTYPES:
        return f"its kernel takes {', '.join(map(str, KERNEL_DTYPES))}, and these tensors are {dtype}"
    if backend == "native":
        if device.type != "cpu":
            return f"the compiled library serves CPU tensors, and these are on {device}"
        if not _native.load():
            return f"the compiled library is not loaded: {_native.status()}"
        if not _native.has_kernel(kernel):
            return f"the loaded library is older than this package: it has no kernel for fastens::{kernel}; rebuild it"
        return None
    if device.type != "cuda":
        return f"triton kernels serve CUDA tensors, and these are on {device}"
    return None


@torch.compiler.assume_constant_result
@functools.cache
def resolve(
    name: str,
    kernels: tuple[tuple[str, str], ...],
    backend: str,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> str:
    """Return the dispatcher name of the op to call: a backend's private op, or ``name`` for the reference.

    Args:
        name: the op, as in :class:`Op`.
        kernels: as in :class:`Op`.
        backend: "auto" takes the first backend that is available; any other must be.
        device: where the tensors are.
        dtype: dtype of the tensors, or None where the op takes none.

    Raises:
        ValueError: ``backend`` is unknown.
        RuntimeError: ``backend`` was asked for by name and is not available; the causes are named.
    """
    if backend == "reference":
        return name
    if backend == "auto":
        return next((kernel for each, kernel in kernels if missing(kernel, each, device, dtype) is None), name)
    if backend not in BACKENDS:
        raise ValueError(f"`backend`: unknown backend {backend!r}; expected 'auto', {', '.join(map(repr, BACKENDS))}")
    kernel = dict(kernels).get(backend)
    cause = missing(kernel, backend, device, dtype)
    if kernel is None or cause is not None:
        raise RuntimeError(
            f"`backend`: {backend!r} cannot run {name!r}: {cause}. "
            "Use backend='auto' to fall back, or backend='reference'"
        )
    return kernel
