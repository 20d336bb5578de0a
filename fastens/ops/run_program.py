"""Running the program of a folded pass."""

import torch
from torch import Tensor

from fastens import _native
from fastens.ops._dispatch import LIBRARY

LIBRARY.define(
    "_run_program_native(Tensor program, Tensor weights, Tensor(a!) arena, Tensor[] inputs, Tensor(b!)[] outputs, "
    "int num_threads) -> ()"
)


def available() -> bool:
    """Whether the compiled library is there, without which no program runs."""
    return _native.has_kernel("_run_program_native")


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
