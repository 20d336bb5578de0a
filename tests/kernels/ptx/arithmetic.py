"""Registers of a block, and the statements that compute on them alone."""

import numpy as np

from tests.kernels.ptx.layouts import bits_of, rounded

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "ltu": lambda a, b: ~(a >= b), "gtu": lambda a, b: ~(a <= b), "leu": lambda a, b: ~(a > b),
    "geu": lambda a, b: ~(a < b), "neu": np.not_equal,
    "nan": lambda a, b: np.isnan(a) | np.isnan(b), "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
}  # fmt: skip
PARAMETERS = 1 << 62  # where their addresses begin


class Arithmetic:
    """What each thread of a block computes by itself; its ``threads``, ``registers`` and ``values`` are the block's."""

    def get(self, name, kind):
        """The operand of this type [threads]."""
        if kind == "pred":
            found = self.registers[name] if name in self.registers else np.full(self.threads, int(name) != 0)
            return found.astype(bool, copy=False)
        raw = self.raw(name, bits_of(kind)).astype(UNSIGNED[bits_of(kind)])
        if kind.endswith("x2"):
            raise NotImplementedError(f"pairs of numbers: {kind}")
        if kind == "bf16":
            return (raw.astype(np.uint32) << 16).view(np.float32)
        return raw.view({"s": f"i{bits_of(kind) // 8}", "f": f"f{bits_of(kind) // 8}"}.get(kind[0], raw.dtype))

    def raw(self, name, bits):
        if name in self.registers:
            return self.registers[name]
        if name.startswith("%"):
            kind, _, axis = name.partition(".")
            if kind not in ("%tid", "%ctaid"):
                raise RuntimeError(f"{name} is read, and nothing was written to it")
            given = self.at["xyz".index(axis)] if kind == "%ctaid" else np.arange(self.threads) * (axis == "x")
            return np.full(self.threads, given, np.uint32)
        if name == "global_smem":
            return np.zeros(self.threads, np.uint64)
        if name in self.values:
            return np.full(self.threads, PARAMETERS + list(self.values).index(name), np.uint64)
        number = int(name[2:], 16) if name[:2] in ("0f", "0d") else int(name, 0)
        return np.full(self.threads, number & (2**bits - 1), UNSIGNED[bits])

    def put(self, name, value, on):
        if value.dtype != bool:
            value = value.view(UNSIGNED[value.dtype.itemsize * 8])
        if on is not self.everybody and name in self.registers:
            value = np.where(on, value, self.registers[name].astype(value.dtype))
        self.registers[name] = value

    def address(self, text, on):
        base, _, offset = text.strip("[] ").partition("+")
        return self.raw(base.strip(), 64)[on].astype(np.uint64) + np.uint64(int(offset or "0", 0) & (2**64 - 1))

    # arithmetic
    def binary(self, opcode, operands, on, function):
        kind = opcode[-1]
        if kind in ("s16x2", "u16x2"):
            a, b = (self.get(x, "b32").view(UNSIGNED[16]).view(f"{kind[0].replace('s', 'i')}2") for x in operands[1:3])
            return self.put(operands[0], function(a, b).view(np.uint32), on)
        a, b = (self.get(x, kind) for x in operands[1:3])
        with np.errstate(all="ignore"):
            result = function(a, b)
        return self.put(operands[0], result.astype(bool if kind == "pred" else a.dtype), on)

    def do_add(self, opcode, operands, on):
        self.binary(opcode, operands, on, np.add)

    def do_sub(self, opcode, operands, on):
        self.binary(opcode, operands, on, np.subtract)

    def do_and(self, opcode, operands, on):
        self.binary(opcode, operands, on, np.bitwise_and)

    def do_or(self, opcode, operands, on):
        self.binary(opcode, operands, on, np.bitwise_or)

    def do_xor(self, opcode, operands, on):
        self.binary(opcode, operands, on, np.bitwise_xor)

    def do_min(self, opcode, operands, on):
        self.binary(opcode, operands, on, np.minimum if opcode[-1][0] != "f" or "NaN" in opcode else np.fmin)

    def do_max(self, opcode, operands, on):
        self.binary(opcode, operands, on, np.maximum if opcode[-1][0] != "f" or "NaN" in opcode else np.fmax)

    def do_div(self, opcode, operands, on):
        if opcode[-1][0] == "f":
            return self.binary(opcode, operands, on, np.divide)
        return self.binary(opcode, operands, on, lambda a, b: np.trunc(a.astype(float) / b).astype(np.int64))

    def do_rem(self, opcode, operands, on):
        self.binary(opcode, operands, on, np.fmod)

    def product(self, opcode, operands):
        """A product, of the bits that the opcode asks for; and their type."""
        kind = opcode[-1]
        a, b = (self.get(x, kind) for x in operands[1:3])
        if kind[0] == "f":
            return a * b, kind
        bits = bits_of(kind)
        whole = a.astype(np.int64 if kind[0] == "s" else np.uint64) * b.astype(
            np.int64 if kind[0] == "s" else np.uint64
        )
        if "wide" in opcode:
            return whole, kind[0] + str(2 * bits)
        if "hi" in opcode:
            whole = whole >> bits
        return whole.astype(a.dtype), kind

    def do_mul(self, opcode, operands, on):
        self.put(operands[0], self.product(opcode, operands)[0], on)

    def do_mad(self, opcode, operands, on):
        result, kind = self.product(opcode, operands)
        self.put(operands[0], result + self.get(operands[3], kind), on)

    def do_fma(self, opcode, operands, on):
        a, b, c = (self.get(x, opcode[-1]).astype(np.float64) for x in operands[1:])
        self.put(operands[0], (a * b + c).astype(np.float32), on)

    def do_not(self, opcode, operands, on):
        self.put(operands[0], ~self.get(operands[1], opcode[-1]), on)

    def do_neg(self, opcode, operands, on):
        self.put(operands[0], -self.get(operands[1], opcode[-1]), on)

    def do_abs(self, opcode, operands, on):
        self.put(operands[0], np.abs(self.get(operands[1], opcode[-1])), on)

    def do_sqrt(self, _, operands, on):
        self.put(operands[0], np.sqrt(self.get(operands[1], "f32")), on)

    def do_ex2(self, _, operands, on):
        with np.errstate(all="ignore"):
            self.put(operands[0], np.exp2(self.get(operands[1], "f32")), on)

    def shift(self, opcode, operands, on, function):
        a, by = self.get(operands[1], opcode[-1]), self.get(operands[2], "u32").astype(np.int64)
        bits = bits_of(opcode[-1])
        result = function(a, np.minimum(by, bits - 1).astype(a.dtype))
        empty = (by >= bits) & (opcode[-1][0] != "s")
        self.put(operands[0], np.where(empty, 0, result).astype(a.dtype), on)

    def do_shl(self, opcode, operands, on):
        self.shift(opcode, operands, on, np.left_shift)

    def do_shr(self, opcode, operands, on):
        self.shift(opcode, operands, on, np.right_shift)

    def do_bfe(self, opcode, operands, on):
        a, (first, length) = self.get(operands[1], opcode[-1]), (int(x) for x in operands[2:])
        unused = bits_of(opcode[-1]) - length
        self.put(operands[0], a << (unused - first) >> unused, on)  # of signed numbers the sign is drawn

    def do_setp(self, opcode, operands, on):
        compare = COMPARISONS[opcode[1]]
        self.put(operands[0], compare(*(self.get(x, opcode[-1]) for x in operands[1:3])), on)

    def do_selp(self, opcode, operands, on):
        chosen = np.where(self.get(operands[3], "pred"), *(self.get(x, opcode[-1]) for x in operands[1:3]))
        self.put(operands[0], chosen, on)

    def do_mov(self, opcode, operands, on):
        to, source = operands
        bits = 1 if opcode[-1] == "pred" else bits_of(opcode[-1])
        if to.startswith("{"):
            names = [x.strip() for x in to.strip("{}").split(",")]
            value, each = self.get(source, opcode[-1]), bits // len(names)
            for i, name in enumerate(names):
                self.put(name, (value >> (each * i)).astype(UNSIGNED[each]), on)
        elif source.startswith("{"):
            names = [x.strip() for x in source.strip("{}").split(",")]
            each, whole = bits // len(names), np.zeros(self.threads, UNSIGNED[bits])
            for i, name in enumerate(names):
                whole |= self.get(name, f"b{each}").astype(whole.dtype) << whole.dtype.type(each * i)
            self.put(to, whole, on)
        else:
            self.put(to, self.get(source, opcode[-1]), on)

    def do_cvt(self, opcode, operands, on):
        to, source = opcode[-2:]
        if to == "bf16x2":
            high, low = (rounded(self.get(x, "f32")) for x in operands[1:])
            return self.put(operands[0], (high.astype(np.uint32) << 16) | low, on)
        value = self.get(operands[1], source)
        if to == "bf16":
            return self.put(operands[0], rounded(value), on)
        return self.put(operands[0], value.astype({"s": "i", "u": "u"}.get(to[0], "f") + str(bits_of(to) // 8)), on)

    def do_cvta(self, _, operands, on):
        self.put(operands[0], self.raw(operands[1], 64).astype(np.uint64), on)
