"""The C++ header of a program's steps, made of :mod:`fastens.program.steps`: the only place that says what they are.

``python -m fastens.program.layout`` writes ``csrc/kernels/program/layout.h`` anew.
"""

from __future__ import annotations

import dataclasses
import inspect
import pathlib
import re
from typing import Any, get_args, get_origin

from fastens.files import whole
from fastens.program import steps

HEADER = pathlib.Path(__file__).resolve().parents[2] / "csrc" / "kernels" / "program" / "layout.h"
_RECORDS = (steps.Image, steps.Strided, steps.Mask, steps.Heads)
_CONSTANTS = {
    "kStepWidth": (steps.STEP_WIDTH, "64-bit words of a step"),
    "kLanes": (steps.LANES, "output channels of one vector of packed weights"),
    "kMaxDims": (steps.MAX_DIMS, ""),
    "kMaxInputs": (steps.MAX_INPUTS, ""),
    "kMaxInstructions": (steps.MAX_INSTRUCTIONS, ""),
    "kPatchBytes": (steps.PATCH_BYTES, "input of one task of a convolution: a share of the second-level cache"),
    "kTasksPerThread": (steps.TASKS_PER_THREAD, ""),
}


def _camel(name: str) -> str:
    return "".join(part.capitalize() for part in name.lower().split("_"))


def _enum(name: str, values: dict[str, int], comment: str) -> list[str]:
    return [
        f"// {comment}",
        f"enum class {name} : int64_t {{",
        *(f"  k{n} = {v}," for n, v in values.items()),
        "};",
        "",
    ]


def _comments(record: type) -> dict[str, str]:
    """What stands behind each field in the source."""
    lines = inspect.getsource(record).splitlines()
    return {m[1]: m[2] for line in lines if (m := re.match(r"    (\w+): .*  # (.*)", line))}


def _member(name: str, hint: Any) -> str:
    """The declaration of a field."""
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        return f"{kinds[0].__name__} {name}[{len(kinds)}]"
    if name == "instructions":
        return f"Instruction {name}[kMaxInstructions]"
    if get_origin(hint) is list:
        length = {"sizes": "kMaxDims", "strides": "kMaxDims", "inputs": "kMaxInputs"}[name]
        return f"{_member(name, get_args(hint)[0])}[{length}]"
    if hint is steps.Address:
        return f"Address {name}"
    return f"{ {int: 'int64_t', float: 'double'}.get(hint, getattr(hint, '__name__', '')) } {name}".strip()


def fields(record: type) -> dict[str, Any]:
    """The fields of a record and their types, those of a step without the header and what its base has."""
    base = record.__mro__[1]
    of_base = {field.name for field in dataclasses.fields(base)} if dataclasses.is_dataclass(base) else set()
    return {name: hint for name, hint in steps.fields_of(record).items() if name not in of_base}


def kinds() -> list[type[steps.Step]]:
    """Every kind of step, in the order of their numbers."""
    return sorted((*steps.Step.__subclasses__(), *steps.Conv.__subclasses__()), key=lambda kind: kind.kind)


def _struct(record: type) -> list[str]:
    comments, base = _comments(record), record.__mro__[1]
    derived = f" : {base.__name__}" if base not in (object, steps.Step) else ""
    text = [f"// {line}".rstrip() for line in inspect.cleandoc(record.__doc__ or "").splitlines()]
    text.append(f"struct {record.__name__}{derived} {{")
    if base is steps.Step:
        text.append("  Header header;")
    for name, hint in fields(record).items():
        comment = f"  // {comments[name]}" if name in comments else ""
        text.append(f"  {_member(name, hint)};{comment}")
    return [*text, "};", ""]


def header() -> str:
    """The text of the header."""
    text = [
        "// Made by `python -m fastens.program.layout` of fastens/program/steps.py: change that, and make it again.",
        "#pragma once",
        "",
        "#include <cstdint>",
        "",
        "// clang-format off",
        "namespace fastens::program {",
        "",
    ]
    for name, (value, comment) in _CONSTANTS.items():
        kind = "int" if name.startswith(("kLanes", "kMax")) else "int64_t"
        text.append(f"constexpr {kind} {name} = {value};" + (f"  // {comment}" if comment else ""))
    numbered = {kind.__name__: kind.kind for kind in kinds()}
    text += [f"constexpr int64_t kKinds = {max(numbered.values()) + 1};", ""]
    text += _enum("Kind", numbered, "What a step is.")
    text += _enum("Activation", {_camel(a.name): a for a in steps.Activation}, inspect.getdoc(steps.Activation) or "")
    names = ", ".join(f'"{a.name.lower()}"' for a in steps.Activation)
    text += [f"constexpr const char* kActivationNames[] = {{{names}}};", ""]
    text += _enum("Opcode", {_camel(o.name): o for o in steps.Opcode}, inspect.getdoc(steps.Opcode) or "")
    dtypes = {_camel(str(dtype).removeprefix("torch.")): number for dtype, number in steps.DTYPES.items()}
    text += _enum("Dtype", dtypes, "What a value of a pointwise step is in memory.")
    sizes = ", ".join(str(dtype.itemsize) for dtype in steps.DTYPES)
    text += [f"constexpr int64_t kSizes[] = {{{sizes}}};  // bytes of each Dtype", ""]
    text += ["// slot << 48 | bytes from its start; negative for what is absent.", "using Address = int64_t;", ""]
    text += ["struct Header {", "  int64_t kind, tasks;", "};", ""]
    text += ["struct Instruction {", "  int64_t code;  // opcode | a << 16 | b << 32", "  double immediate;", "};", ""]
    for record in (*_RECORDS, *sorted(kinds(), key=lambda kind: kind is steps.Winograd)):
        text += _struct(record)
    return "\n".join([*text, "}  // namespace fastens::program", ""])


if __name__ == "__main__":
    with whole(HEADER) as (file,):
        file.write_text(header())
    print(HEADER)
