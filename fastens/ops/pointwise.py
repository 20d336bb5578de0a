"""A chain of elementwise instructions on broadcast operands, in one pass."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastens.ops._dispatch import Op
from fastens.program.steps import Opcode
from fastens.reference import pointwise as reference

Instruction = tuple[Opcode, int, int, float]


def _fake(inputs: list[Tensor], *_: object) -> Tensor:
    size = torch.broadcast_shapes(*(x.shape for x in inputs))
    return inputs[0].new_empty(size, dtype=reference.result_dtype(inputs))


_pointwise = Op(
    "pointwise(Tensor[] inputs, int[] opcodes, int[] a, int[] b, float[] numbers) -> Tensor",
    reference.pointwise,
    {"triton": _fake},
)


def pointwise(
    inputs: Sequence[Tensor], code: Sequence[Instruction], *, backend: str = "auto", into: Tensor | None = None
) -> Tensor:
    """Run a chain of elementwise instructions, in float32 at least, and round its result once.

    The inputs are the first registers, and each instruction writes the next one; the last is the result.

    Args:
        inputs: tensors that broadcast against each other. One that is not floating point counts as float32, unless all
            instructions are copies.
        code: of each instruction its :class:`fastens.program.steps.Opcode`, the registers of its one or two operands,
            and the number of one that takes a number.
        backend: the code that runs it.
        into: a tensor of the result's shape to write to, of any dtype and strides; none for memory of its own. No
            derivative goes through it.

    Returns:
        The result, of the dtype that the inputs promote to, or ``into``.

    Raises:
        ValueError: no inputs or instructions, a register that is not written yet, ``into`` of another shape, or an
            unknown backend.
        RuntimeError: a backend asked for by name that cannot run here.
    """
    inputs = list(inputs)
    if not inputs or not code:
        raise ValueError(f"pointwise: {len(inputs)} inputs and {len(code)} instructions, expected one of each at least")
    opcodes, a, b, numbers = [], [], [], []
    for i, (opcode, first, second, number) in enumerate(code):
        second = second if opcode in reference.BINARY else first
        if not 0 <= first < len(inputs) + i or not 0 <= second < len(inputs) + i:
            raise ValueError(
                f"pointwise: instruction {i} reads registers {first} and {second}, and {len(inputs) + i} are written"
            )
        opcodes.append(int(opcode))
        a.append(first)
        b.append(second)
        numbers.append(float(number))
    floats = [x for x in inputs if x.is_floating_point()] or [inputs[0].new_empty(0, dtype=torch.float32)]
    run = _pointwise.resolve(backend, floats)
    if into is None:
        return run(inputs, opcodes, a, b, numbers)
    size = torch.broadcast_shapes(*(x.shape for x in inputs))
    if into.shape != size:
        raise ValueError(f"pointwise: into is {list(into.shape)}, expected {list(size)}")
    if run is not torch.ops.fastens.pointwise:
        from fastens.kernels.pointwise import pointwise as launch

        return launch(inputs, opcodes, a, b, numbers, into)
    return into.copy_(reference.unrounded(inputs, opcodes, a, b, numbers))
