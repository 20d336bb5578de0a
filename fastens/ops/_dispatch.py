"""Which backend runs an op: the choice that every module of :mod:`fastens.ops` makes in the same way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from fastens import _native

BACKENDS = ("reference", "native", "triton")

NATIVE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True)
class Op:
    """One op of the registry.

    Attributes:
        name: basename of the op in every folder (``ops/<name>.py``, ``reference/<name>.py``, ...).
        public: the public function.
        reference: the naive PyTorch function of the same signature.
        kernels: dispatcher name of the op that each backend has, for example ``{"native": "_aggregate_native"}``;
            "reference" is the op ``fastens::<name>`` itself.
        dtypes: dtypes that the compiled kernel takes.
    """

    name: str
    public: Callable[..., Any]
    reference: Callable[..., Any]
    kernels: dict[str, str] = dataclasses.field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = NATIVE_DTYPES

    @property
    def backends(self) -> tuple[str, ...]:
        """The backends that this op has, whether or not they are available here."""
        return ("reference", *self.kernels)


def missing(kernel: str | None, backend: str, device: torch.device) -> str | None:
    """Return None where ``backend`` can run the op on ``device``, or why it cannot.

    Args:
        kernel: dispatcher name of the op's kernel for this backend, or None where it has none.
        backend: "native" or "triton".
        device: where the tensors are.
    """
    if kernel is None:
        return f"this op has no {backend} kernel"
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
def resolve(
    name: str,
    kernels: tuple[tuple[str, str], ...],
    backend: str,
    device: torch.device,
    dtype: torch.dtype | None = None,
    dtypes: tuple[torch.dtype, ...] = NATIVE_DTYPES,
) -> str:
    """Return the dispatcher name of the op to call: a backend's private op, or ``name`` for the reference.

    Args:
        name: the op, as in :class:`Op`.
        kernels: (backend, dispatcher name) pairs, strongest backend first.
        backend: "auto" takes the first backend that is available; any other must be.
        device: where the tensors are.
        dtype: dtype of the tensors, or None where the op takes none.
        dtypes: dtypes that the compiled kernels take.

    Raises:
        ValueError: ``backend`` is unknown.
        RuntimeError: ``backend`` was asked for by name and is not available; the causes are named.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"`backend`: unknown backend {backend!r}; expected 'auto', {', '.join(map(repr, BACKENDS))}")
    if backend == "reference":
        return name
    table = dict(kernels)
    fits = dtype is None or dtype in dtypes
    if backend == "auto":
        for candidate, kernel in kernels:
            if fits and missing(kernel, candidate, device) is None:
                return kernel
        return name
    cause = missing(table.get(backend), backend, device)
    if cause is None and not fits:
        cause = f"its kernel takes {', '.join(map(str, dtypes))}, and these tensors are {dtype}"
    if cause is not None:
        raise RuntimeError(
            f"`backend`: {backend!r} cannot run {name!r}: {cause}. "
            "Use backend='auto' to fall back, or backend='reference'"
        )
    return table[backend]
