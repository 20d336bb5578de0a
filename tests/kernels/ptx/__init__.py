"""An emulator of the PTX of our kernels, on NumPy: what Triton compiles for sm_90a runs on tensors of the CPU.

Triton's interpreter runs its source; this runs what the compiler made of it: layouts, swizzles, boxes of tensor maps,
fragments of products, masks. A block's threads go together, an instruction at a time, and branches are the block's.

What is asynchronous has its effect as early or as late as it may: loads when they are issued (``"early"``) or when they
are waited for (``"late"``), products the other way round. A kernel that is right either way waits for what it needs.
Shared memory begins as NaN; what another warp wrote, or still reads, without a barrier between is an error, and so is
memory of the GPU outside of the tensors at hand.
"""

import contextlib
from unittest import mock

import numpy as np
import torch
from triton.runtime.jit import JITFunction

from bench.gpu_code import compiling
from tests.kernels.ptx.block import Block, parsed
from tests.kernels.ptx.memory import Memory, TensorMap


def flat(arguments, kinds):
    """The arguments that the machine code has, with their types; of tuples each element."""
    for x, kind in zip(arguments, kinds, strict=False):
        if isinstance(kind, tuple | list):
            yield from flat(x, kind)
        elif kind != "constexpr":
            yield x, kind


@contextlib.contextmanager
def emulating(loads="early", reverse=False, edit=lambda ptx: ptx):
    """Within it every launch runs here, ``loads`` early or late, its blocks in order or in reverse, edited before."""
    with compiling() as compiled:
        compile_only = JITFunction.run

        def run(self, *arguments, grid, **options):
            binary = compile_only(self, *arguments, grid=grid, **options)
            statements, parameters = parsed(edit(binary.asm["ptx"]))
            memory, given = Memory(), []
            maps = iter(binary.metadata.tensordesc_meta or ())
            named = dict(zip(binary.src.signature, arguments, strict=False)) | options
            for x, kind in flat([named.get(name) for name in binary.src.signature], binary.src.signature.values()):
                if isinstance(x, torch.Tensor):
                    given.append(memory.add(x))
                elif hasattr(x, "block_shape"):
                    memory.add(x.base)
                    given += [TensorMap(x, next(maps)), *x.shape, *x.strides]
                else:
                    given.append(int(np.float32(x).view(np.uint32)) if kind == "fp32" else x)
            values = dict(zip((name for _, name in parameters), [*given, 0, 0], strict=True))
            blocks = [(i, j, 0) for j in range(grid[1] if len(grid) > 1 else 1) for i in range(grid[0])]
            threads, shared = 32 * binary.metadata.num_warps, binary.metadata.shared
            for at in blocks[::-1] if reverse else blocks:
                Block(statements, values, memory, at, threads, shared, loads == "early").run()
            return binary

        with mock.patch.object(JITFunction, "run", run):
            yield compiled
