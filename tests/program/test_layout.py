"""The steps of C++ are those of Python: the header is made of them, and a compiler finds every word in its place."""

import dataclasses
import itertools
import struct
import subprocess

import pytest

from fastens import _build
from fastens.program import layout, steps


def test_the_header_is_that_of_the_steps():
    made, kept = layout.header().splitlines(), layout.HEADER.read_text().splitlines()
    for number, (ours, theirs) in enumerate(itertools.zip_longest(made, kept), 1):
        assert ours == theirs, (
            f"{layout.HEADER.name}:{number} is {theirs!r}, and fastens/program/steps.py makes it {ours!r}: "
            "run `python -m fastens.program.layout`"
        )


LENGTHS = {"sources": 2, "sizes": 6, "strides": 6, "inputs": 4, "instructions": 16}


def filled(kind, numbers):
    """A record whose every word is another number, and the C++ name of each word in their order."""
    names, values = [], {}
    for name, hint in steps.fields_of(kind).items():
        members = values[name] = []
        count = LENGTHS.get(name, 1)
        for i in range(count):
            at = f"{name}[{i}]" if count > 1 else name
            if name == "instructions":
                names.append(f"{name}[{i // 2}].{('code', 'immediate')[i % 2]}")
                members.append(next(numbers) if i % 2 == 0 else float(next(numbers)))
            elif dataclasses.is_dataclass(inner := element(hint)):
                inside, value = filled(inner, numbers)
                names += [f"{at}.{each}" for each in inside]
                members.append(value)
            else:
                names.append(at)
                members.append(float(next(numbers)) if hint is float else next(numbers))
        values[name] = members[0] if count == 1 else tuple(members) if "sources" in name else members
    return names, kind(**values)


def element(hint):
    return getattr(hint, "__args__", (hint,))[0]


@pytest.mark.parametrize("kind", layout.kinds(), ids=lambda kind: kind.__name__)
def test_encoding_and_decoding_are_inverse(kind):
    names, step = filled(kind, itertools.count(1))
    assert len(names) == len(set(names))
    assert steps.decode(steps.encode([step])) == [step]


def test_a_compiler_finds_every_word_where_it_is_written(tmp_path):
    try:
        compiler = _build.compiler()
    except _build.ToolMissing as error:
        pytest.skip(str(error))
    checks = [f'#include "{layout.HEADER}"', "#include <cstddef>", "using namespace fastens::program;"]
    for kind in layout.kinds():
        numbers = itertools.count(1)
        names, step = filled(kind, numbers)
        words = step.words()
        assert words[:2] == [kind.kind, 1]
        for place, name in enumerate(names, 2):
            held = words[place] if words[place] < 1 << 40 else struct.unpack("<d", struct.pack("<q", words[place]))[0]
            assert held == place - 1, f"{kind.__name__}.{name} is not word {place}"
            checks.append(f'static_assert(offsetof({kind.__name__}, {name}) == {8 * place}, "{kind.__name__}.{name}");')
        checks.append(f'static_assert(sizeof({kind.__name__}) == {8 * (len(names) + 2)}, "{kind.__name__}");')
        checks.append(f"static_assert(static_cast<int>(Kind::k{kind.__name__}) == {kind.kind});")
    source = tmp_path / "layout.cpp"
    source.write_text("\n".join(checks))
    command = [*compiler.split(), "-std=c++20", "-Wno-invalid-offsetof", "-fsyntax-only", str(source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
