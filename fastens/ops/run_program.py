"""Running the program of a folded pass, and the instruction set that the compiled kernels use."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fastens import _native
from fastens.ops._dispatch import LIBRARY

LIBRARY.define(
    "_run_program_native(Tensor program, Tensor weights, Tensor(a!) arena, Tensor[] inputs, Tensor(b!)[] outputs, "
    "int num_threads) -> ()"
)
LIBRARY.define("_cpu_target_native(str name) -> str")
LIBRARY.define("_cpu_target_described_native() -> str")
LIBRARY.define("_cpu_targets_native() -> str[]")


@functools.cache
def available() -> bool:
    """Whether the compiled library is there, without which no program runs.

    Raises:
        RuntimeError: ``FASTENS_CPU_TARGET`` names a target that this processor or build does not have.
    """
    return bool(target())


@functools.cache
def targets() -> tuple[str, ...]:
    """The instruction sets that the library was compiled for, the best first; none without the compiled library."""
    return tuple(torch.ops.fastens._cpu_targets_native()) if _native.has_kernel("_run_program_native") else ()


def target() -> str:
    """The instruction set that compiled kernels run on: one of :func:`targets`, empty without the compiled library.

    It is the best one of this processor, or the one that the environment variable ``FASTENS_CPU_TARGET`` named when
    the first kernel ran. Only ``avx512_bf16`` multiplies bfloat16.

    Raises:
        RuntimeError: as :func:`available`.
    """
    return torch.ops.fastens._cpu_target_native("") if _native.has_kernel("_run_program_native") else ""


def why_target() -> str:
    """The instruction set that compiled kernels run on and why it is no better one; empty without the library.

    Raises:
        RuntimeError: as :func:`available`.
    """
    return torch.ops.fastens._cpu_target_described_native() if _native.has_kernel("_run_program_native") else ""


def describe_target(name: str) -> str:
    """What a target means for float32 and bfloat16 networks, in a line."""
    products = "multiplied as such, summed in float32" if name == "avx512_bf16" else "multiplied in float32"
    return f"{name}; bfloat16 is {products}"


@contextmanager
def forced_target(name: str) -> Iterator[None]:
    """Run compiled kernels of the process on another target, as tests do; plans made before may not suit it.

    Raises:
        RuntimeError: this processor or build does not have it.
    """
    before = target()
    torch.ops.fastens._cpu_target_native(name)
    try:
        yield
    finally:
        torch.ops.fastens._cpu_target_native(before)


def run_program(
    program: Tensor, weights: Tensor, arena: Tensor, inputs: list[Tensor], outputs: list[Tensor], num_threads: int
) -> None:
    """Run the steps of a program one after the other.

    Args:
        program: int64 [steps, STEP_WIDTH], see :mod:`fastens.program.steps`.
        weights: float32, what the program reads from slot 1.
        arena: float32, slot 0, overwritten.
        inputs: slots from 2.
        outputs: the slots after those, overwritten.
        num_threads: at most so many threads share the tasks of a step.
    """
    torch.ops.fastens._run_program_native(program, weights, arena, inputs, outputs, num_threads)
