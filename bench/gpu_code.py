"""Kernels compiled without a GPU, and what is read of them: ptxas's messages, registers, spills, the loop of products.

Launchers run on tensors without memory; in place of a launch, the kernel is compiled for the target. What is read is
the text of ``ptxas -v`` and of ``nvdisasm``, both of Triton's wheel, so that nothing depends on an installed CUDA.
"""

import contextlib
import dataclasses
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from fastens.kernels._rows import interpreting
from fastens.ops import _block_ways, _tma_ways

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
REGISTERS = 65536  # of a multiprocessor of compute capability 9.0
SHARED = 228 * 1024  # bytes of its shared memory, of which each block takes 1024 more than it asks for
WARPS = 64
OF_MEMORY = (
    "LD.",
    "LDG",
    "ST.",
    "STG",
    "ATOM",
    "RED.",
    "UTMA",
    "UBLK",
    "CCTL",
)  # of the GPU, not of a block or constant
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)\s*(.*?)\s*;")
LABEL = re.compile(r"\s*(\.L_x_\d+):")
PRODUCT = re.compile(r"HGMMA\.64x(\d+)x(\d+)|HMMA\.16(8)(16|8|4)\.")  # a warp group has 64 rows of it, or each warp 16


class Target:
    """What Triton asks of a driver to compile: the GPU it is for."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.capability

    def get_current_stream(self, device):
        return 0


@contextlib.contextmanager
def compiling(capability=90):
    """Within it every launch compiles instead; yields a list to which (name, grid, constants, binary) are added."""
    if interpreting():
        raise RuntimeError("kernels are compiled in a process without TRITON_INTERPRET, and it is set")
    compiled, run = [], JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **options):
        binary = run(self, *arguments, grid=grid, warmup=True, **options)
        constants = {name: value for name, value in options.items() if isinstance(value, int | str)}
        compiled.append((self.fn.__name__, grid if isinstance(grid, tuple) else (), constants, binary))
        return binary

    with (
        mock.patch.object(driver, "_active", Target(capability)),
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(_tma_ways, "missing_triton", return_value=None),
        mock.patch.object(_block_ways, "missing_triton", return_value=None),
    ):
        yield compiled


@dataclasses.dataclass(frozen=True)
class Loop:
    """The innermost loop that has tensor cores' products: its instructions and what it waits for.

    ``products`` are columns and depth of each (rows of four warps are 64), ``waits`` how many groups of them each wait
    lets be in flight (none where each warp multiplies by itself), ``load_waits`` the same of asynchronous loads.
    """

    instructions: int
    operations: dict[str, int]
    products: tuple[tuple[int, int], ...]
    waits: tuple[int, ...]
    load_waits: tuple[int, ...]

    def count(self, *prefixes):
        """How many of its instructions have a name that begins so."""
        return sum(n for name, n in self.operations.items() if name.startswith(prefixes))


@dataclasses.dataclass(frozen=True)
class Code:
    """A kernel's machine code: resources, ptxas's complaint if it has one, loop, widths of access to global memory.

    ``overlaps`` is whether its launch is beside the end of the one before, and it waits for that before memory.
    """

    kernel: str
    grid: tuple[int, ...]
    constants: dict[str, int | str]
    warps: int
    registers: int
    spilled: int
    shared: int
    complaint: str
    overlaps: bool
    instructions: int
    loops: tuple[Loop, ...]
    stores: dict[int, int]
    loads: dict[int, int]

    @property
    def blocks(self):
        """How many of its blocks fit a multiprocessor."""
        of_registers = REGISTERS // (-(-self.registers // 8) * 8 * 32 * self.warps)
        return min(of_registers, SHARED // (self.shared + 1024), WARPS // self.warps)

    @property
    def of_warp_groups(self):
        """Whether all products are those of warp groups, which begin at 64 rows."""
        return all(loop.count("HGMMA") and not loop.count("HMMA") for loop in self.loops)

    @property
    def in_flight(self):
        """Whether products, and loads where the loop waits for them, go on while it waits for earlier ones."""
        return all(
            (min(loop.waits, default=0) > 0 or not loop.count("HGMMA"))
            and min(loop.load_waits, default=1) > 0
            and loop.count("UTMALDG", "LDGSTS") > 0
            for loop in self.loops
        )


def assembled(binary, folder):
    """The file of a kernel's machine code, and what ptxas says of it; it runs again, since Triton keeps no message."""
    architecture = "sm_90a" if binary.metadata.target.arch == 90 else f"sm_{binary.metadata.target.arch}a"
    newer = ["--regAllocOptLevel=2"] if "regAllocOptLevel" in compiler_text() else []
    ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
    ptx.write_text(binary.asm["ptx"])
    command = [BIN / "ptxas", "-lineinfo", "-v", *newer, f"--gpu-name={architecture}", ptx, "-o", cubin]
    return cubin, subprocess.run(command, capture_output=True, text=True, check=True).stderr


def complaints(log):
    """The lines of what ptxas says that are no figures."""
    return "\n".join(line for line in log.splitlines() if re.search(r"\(C\d+\)|warning", line))


def read(kernel, grid, constants, binary):
    """The :class:`Code` of a compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        cubin, log = assembled(binary, folder)
        sass = subprocess.run([BIN / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True).stdout
    instructions, loops = parse(sass)
    names = [name for name, _ in instructions]
    return Code(
        kernel, grid, constants, binary.metadata.num_warps, int(re.search(r"Used (\d+) registers", log)[1]),
        sum(map(int, re.findall(r"(\d+) bytes spill stores", log))), binary.metadata.shared, complaints(log),
        overlaps(names) and binary.metadata.launch_pdl, len(instructions), loops,
        dict(Counter(width(name) for name in names if name.startswith("STG"))),
        dict(Counter(width(name) for name in names if name.startswith(("LDG.", "LDGSTS")))),
    )  # fmt: skip


def overlaps(names):
    """Whether a kernel lets the next begin, and waits for the one before, before it reads or writes memory."""
    first = next((i for i, name in enumerate(names) if name.startswith(OF_MEMORY)), len(names))
    return {"PREEXIT", "ACQBULK"} <= set(names[:first])


def compiler_text():
    """The source of Triton's compiler, which says with what options it calls ptxas."""
    return (Path(triton.__file__).parent / "backends" / "nvidia" / "compiler.py").read_text()


def width(name):
    """Bytes that an instruction moves for each thread."""
    found = re.search(r"\.(?:[US])?(8|16|64|128)(?:\.|$)", name)
    return int(found[1]) // 8 if found else 4


def parse(sass):
    """Instructions as (name, operands), and the innermost loops that have products."""
    instructions, labels = [], {}
    for line in sass.splitlines():
        if found := LABEL.match(line):
            labels[found[1]] = len(instructions)
        elif found := INSTRUCTION.match(line):
            instructions.append(found.groups())
    spans = []
    for end, (name, operands) in enumerate(instructions):
        to = re.search(r"\.L_x_\d+", operands) if name.startswith("BRA") else None
        if to and labels[to[0]] <= end and any("MMA." in n for n, _ in instructions[labels[to[0]] : end]):
            spans.append((labels[to[0]], end + 1))
    inner = [(a, b) for a, b in spans if not any((a, b) != (c, d) and a <= c and d <= b for c, d in spans)]
    inner = [(a, b) for a, b in inner if not any(c < a and b > d > a for c, d in spans if (c, d) != (a, b))]
    return instructions, tuple(loop_of(instructions[a:b]) for a, b in inner)


def loop_of(body):
    """The :class:`Loop` of these instructions."""
    waits, loads, products = [], [], []
    for name, operands in body:
        if name.startswith("WARPGROUP.DEPBAR"):
            waits.append(int(re.search(r"0x([0-9a-f]+)", operands)[1], 16))
        elif name.startswith("DEPBAR"):
            loads.append(int(re.search(r"0x([0-9a-f]+)", operands)[1], 16))
        elif found := PRODUCT.match(name + operands):
            products.append((int(found[1] or found[3]), int(found[2] or found[4])))
    return Loop(len(body), dict(Counter(name for name, _ in body)), tuple(products), tuple(waits), tuple(loads))
