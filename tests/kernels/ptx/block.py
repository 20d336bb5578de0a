"""One block of a launch: its statements, carried out one after the other by all of its threads."""

import math
import re

import numpy as np

from tests.kernels.ptx.arithmetic import PARAMETERS, UNSIGNED, Arithmetic
from tests.kernels.ptx.layouts import bits_of, fragment, lines, operand, places_of_sums, rows_of_lanes, swizzled
from tests.kernels.ptx.memory import Barrier, Shared

STATEMENT = re.compile(r"(?:@(!?)(%?\w+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)


def parsed(ptx):
    """The statements of a kernel as (label, guard, negated, opcode, operands), and its parameters as (kind, name)."""
    ptx = re.sub(r"//[^\n]*", "", ptx)
    head, body = re.split(r"(?<=\n)\$L__func_end0:", ptx[ptx.index(".entry") :])[0].split("{", 1)
    parameters = re.findall(r"\.param\s+(?:\.align \d+\s+)?\.(\w+)[^,)]*?(\w+_param_\d+)", head)
    statements = []
    for piece in re.split(r";|(?<=[\w$]):\s(?!:)|\n\s*(?=\.loc|\.file|[{}]\s*\n)", body):
        text = piece.strip().lstrip("{}").strip()
        text = re.sub(r"^\.loc[^\n]*\n?", "", text).strip().lstrip("{}").strip()
        if re.fullmatch(r"[$\w]+", text) and text not in ("ret", "exit"):
            statements.append((text, None, False, None, []))
        elif text and not text.startswith((".", "}")):
            negated, guard, opcode, rest = STATEMENT.fullmatch(text).groups()
            operands = [x.strip() for x in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", rest)]
            statements.append((None, guard, negated == "!", opcode.split("."), operands))
    return statements, parameters


class Block(Arithmetic):
    """One block of a launch."""

    def __init__(self, statements, values, memory, at, threads, shared, early_loads):
        self.statements, self.values, self.memory, self.at = statements, values, memory, at
        self.threads, self.early = threads, early_loads
        self.shared = Shared(shared, threads)
        self.registers, self.barriers, self.position = {}, {}, 0
        self.products, self.groups = [], []  # of a warp group: issued, and committed
        self.read, self.groups_read = [], []  # lines of shared memory that these read
        self.unseen = []  # lines that ended products read: other warps may not have waited for them yet
        self.copies, self.copy_groups = [], []
        self.everybody = np.ones(threads, bool)

    def run(self):
        while self.position < len(self.statements):
            label, guard, negated, opcode, operands = self.statements[self.position]
            self.position += 1
            if label is None:
                on = self.everybody if guard is None else self.get(guard, "pred") ^ negated
                getattr(self, f"do_{opcode[0]}")(opcode, operands, on)
        self.drain(0)

    # among threads
    def do_shfl(self, opcode, operands, on):
        lane = np.arange(self.threads) % 32
        to = lane ^ int(operands[2]) if "bfly" in opcode else self.get(operands[2], "u32").astype(int) % 32
        value = self.get(operands[1], "b32")
        self.put(operands[0].split("|")[0], value[np.arange(self.threads) - lane + to], on)

    def do_elect(self, _, operands, on):
        number, chosen = operands[0].split("|")
        self.put(number, np.zeros(self.threads, np.uint32), on)
        self.put(chosen, np.arange(self.threads) % 32 == 0, on)

    def do_bar(self, opcode, operands, on):
        if "warp" not in opcode:
            self.shared.forget()
            self.unseen = []

    def do_bra(self, _, operands, on):
        if on.any() != on.all():
            raise NotImplementedError(f"threads of a block part at a branch to {operands[0]}")
        if on.all():
            places = [i for i, statement in enumerate(self.statements) if statement[0] == operands[0]]
            before = [i for i in places if i < self.position]
            self.position = before[-1] if before else places[0]

    def do_ret(self, _, operands, on):
        self.position = len(self.statements) if on.all() else self.position

    def do_griddepcontrol(self, *_):
        pass

    do_fence = do_membar = do_griddepcontrol

    # memory
    def do_ld(self, opcode, operands, on):
        names = [x.strip() for x in operands[0].strip("{} ").split(",")]
        size = bits_of(opcode[-1]) // 8
        if "param" in opcode:
            value = self.parameter(operands[1].strip("[] "))
            return self.put(names[0], np.full(self.threads, value & (2 ** (8 * size) - 1), UNSIGNED[8 * size]), on)
        threads, addresses = np.flatnonzero(on), self.address(operands[1], on)
        if "global" in opcode:
            found = self.memory.load(addresses, size * len(names))
        else:
            found = self.shared.load(threads, addresses, size * len(names))
        for i, name in enumerate(names):
            whole = np.zeros((self.threads, size), np.uint8)
            whole[threads] = found[:, i * size : (i + 1) * size]
            self.put(name, whole.view(UNSIGNED[8 * size])[:, 0], on)
        return None

    def do_st(self, opcode, operands, on):
        names = [x.strip() for x in operands[1].strip("{} ").split(",")]
        parts = [self.get(name, f"b{bits_of(opcode[-1])}")[on] for name in names]
        values = np.stack(parts, 1).view(np.uint8)
        if "global" in opcode:
            self.memory.store(self.address(operands[0], on), values)
        elif on.any():
            self.shared.store(np.flatnonzero(on), self.address(operands[0], on), values)

    def do_atom(self, opcode, operands, on):
        found = np.zeros(self.threads, np.int32)
        for thread, address in zip(np.flatnonzero(on), self.address(operands[1], on), strict=True):
            where = np.array([address])
            found[thread] = self.memory.load(where, 4).view(np.int32)[0, 0]
            added = found[thread] + self.get(operands[2], "s32")[thread]
            self.memory.store(where, np.array([[added]], np.int32).view(np.uint8))
        self.put(operands[0], found, on)

    def do_cp(self, opcode, operands, on):
        if "bulk" in opcode:
            if on.any():
                self.copy_box(operands, int(np.flatnonzero(on)[0]))
        elif "commit_group" in opcode:
            self.copy_groups.append(self.copies)
            self.copies = []
        elif "wait_group" in opcode:
            last = len(self.copy_groups) - int(operands[0], 0)
            for copy in [copy for group in self.copy_groups[: max(0, last)] for copy in group]:
                copy()
            self.copy_groups = self.copy_groups[max(0, last) :]
        elif on.any():
            size = int(operands[2], 0)
            threads, to, source = np.flatnonzero(on), self.address(operands[0], on), self.address(operands[1], on)
            held = self.get(operands[3], "u32")[on] if len(operands) > 3 else np.full(len(threads), size)
            values = np.zeros((len(threads), size), np.uint8)
            values[held > 0] = self.memory.load(source[held > 0], size)
            self.copies.append(lambda: self.shared.store(threads, to, values))
            if self.early:
                self.copies.pop()()

    def parameter(self, name):
        """The parameter of this name, or of this address."""
        return (
            self.values[name]
            if name in self.values
            else list(self.values.values())[int(self.raw(name, 64)[0]) - PARAMETERS]
        )

    def copy_box(self, operands, thread):
        pointer, *corner = re.findall(r"%\w+", operands[1])
        place = int(self.get(operands[0].strip("[] "), "u32")[thread])
        tensor_map = self.parameter(pointer)
        at = [int(self.get(x, "s32")[thread]) for x in corner]
        barrier = self.barriers[int(self.get(operands[2].strip("[] "), "u32")[thread])]
        size = math.prod(tensor_map.lengths) * tensor_map.item
        for read in (*self.unseen, *self.read, *(read for group in self.groups_read for read in group)):
            if ((read >= place // 128) & (read < -(-(place + size) // 128))).any():
                raise RuntimeError("shared memory is loaded anew that products read, and not all warps know their end")

        def copy():
            values = tensor_map.box(self.memory, at[::-1])
            where = swizzled(place + np.arange(values.size), tensor_map.swizzle)
            self.shared.bytes[where] = values
            barrier.arrive(0, -values.size)

        barrier.copies.append(copy)
        if self.early:
            barrier.copies.pop()()

    def do_mbarrier(self, opcode, operands, on):
        name = operands[1] if opcode[1] in ("arrive", "try_wait") else operands[0]
        for address in {int(x) for x in self.get(name.strip("[] "), "u32")[on]}:
            if opcode[1] == "init":
                self.barriers[address] = Barrier(int(operands[1]))
            elif opcode[1] == "arrive":
                self.barriers[address].arrive(on.sum(), int(self.get(operands[2], "u32")[on][0]))
            elif opcode[1] == "try_wait":
                self.barriers[address].wait(int(self.get(operands[2], "u32")[0]))
                self.put(operands[0], self.everybody, on)

    def do_ldmatrix(self, opcode, operands, on):
        names = [x.strip() for x in operands[0].strip("{} ").split(",")]
        rows = self.shared.load(np.arange(self.threads), self.address(operands[1], on), 16).view(np.uint16)
        for i, name in enumerate(names):
            taken = rows_of_lanes(rows.reshape(-1, 32, 8)[:, 8 * i : 8 * i + 8], "trans" in opcode)
            self.put(name, taken, on)

    def do_stmatrix(self, opcode, operands, on):
        names, addresses = [x.strip() for x in operands[1].strip("{} ").split(",")], self.address(operands[0], on)
        warps, lane = self.threads // 32, np.arange(32)
        for i, name in enumerate(names):
            pairs = np.ascontiguousarray(self.get(name, "b32")).view(np.uint16).reshape(warps, 32, 2)
            matrix = np.zeros((warps, 8, 8), np.uint16)
            for e in range(2):
                index = (lane // 4, lane % 4 * 2 + e) if "trans" not in opcode else (lane % 4 * 2 + e, lane // 4)
                matrix[:, index[0], index[1]] = pairs[:, :, e]
            threads = np.arange(self.threads).reshape(warps, 32)[:, 8 * i : 8 * i + 8].ravel()
            self.shared.store(threads, addresses[threads], matrix.reshape(-1, 8).view(np.uint8))

    def do_wgmma(self, opcode, operands, on):
        if opcode[1] == "mma_async":
            self.products.append(self.warp_group_product(opcode, operands))
            self.read += self.lines_read(opcode, operands)
            if not self.early:  # loads are late, so that products are early
                self.products.pop()()
        elif opcode[1] == "commit_group":
            self.groups.append(self.products)
            self.groups_read.append(self.read)
            self.products, self.read = [], []
        elif opcode[1] == "wait_group":
            self.drain(int(operands[0]))

    def do_mma(self, opcode, operands, on):
        kind = opcode[6]
        names, a, b, c = ([x.strip() for x in operand.strip("{}").split(",")] for operand in operands)
        a, b = ([self.get(x, "b32").reshape(-1, 32) for x in given] for given in (a, b))
        lane, sums = np.arange(32), []
        for warp in range(self.threads // 32):
            x = fragment([np.tile(r[warp], 4) for r in a], kind)[:16]
            y = fragment([np.tile(r[warp], 4) for r in (b[0], b[0], b[1], b[1])], kind)[:8]
            sums.append(x @ y.T)
        for r, (name, before) in enumerate(zip(names, c, strict=True)):
            found = np.stack(sums)[:, lane // 4 + 8 * (r // 2), lane % 4 * 2 + r % 2].ravel()
            self.put(name, found + self.get(before, "f32"), on)

    def drain(self, left):
        ended = max(0, len(self.groups) - left)
        for product in [product for group in self.groups[:ended] for product in group]:
            product()
        self.groups = self.groups[ended:]
        self.unseen += [read for group in self.groups_read[:ended] for read in group]
        self.groups_read = self.groups_read[ended:]

    def lines_read(self, opcode, operands):
        """The lines of shared memory that a product reads, of each operand and warp group."""
        _, columns, depth = map(int, re.findall(r"\d+", opcode[4]))
        of_registers = operands[1].startswith("{")
        flags = [int(x) for x in operands[6:]] or [0, 0]
        sides = [(operands[2], columns, flags[-1])] + [(operands[1], 64, flags[0])] * (not of_registers)
        return [
            lines(int(self.get(name, "b64")[128 * group]), size, depth, opcode[-1], across)
            for name, size, across in sides
            for group in range(self.threads // 128)
        ]

    def warp_group_product(self, opcode, operands):
        _, columns, depth = map(int, re.findall(r"\d+", opcode[4]))
        names, kind = [x.strip() for x in operands[0].strip("{}").split(",")], opcode[-1]
        of_registers = operands[1].startswith("{")
        keeps = self.get(operands[3], "pred")
        left = operands[1].strip("{}").split(",") if of_registers else operands[1]
        a = [self.get(x.strip(), "b32") for x in left] if of_registers else self.get(left, "b64")
        b = self.get(operands[2], "b64")
        flags = [int(x) for x in operands[6:]] or [0, 0]
        across_a, across_b = (0, flags[-1]) if of_registers else flags

        def multiply():
            found = np.empty((len(names), self.threads), np.float32)
            for group in range(self.threads // 128):
                own = slice(128 * group, 128 * group + 128)
                if of_registers:
                    x = fragment([r[own] for r in a], kind)
                else:
                    x = operand(self.shared.bytes, int(a[own][0]), 64, depth, kind, across_a)
                y = operand(self.shared.bytes, int(b[own][0]), columns, depth, kind, across_b)
                found[:, own] = (x @ y.T)[places_of_sums(len(names))]
            nothing = np.zeros(self.threads, np.uint32)
            for name, sums in zip(names, found, strict=True):
                before = self.registers.get(name, nothing).view(np.float32)
                self.registers[name] = (np.where(keeps, before, 0) + sums).view(np.uint32)

        return multiply
