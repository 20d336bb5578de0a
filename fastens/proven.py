"""For which sources the machine code of GPU kernels was read: the list that ``make test-gpu-code`` writes.

``kernels/proven.json``, which wheels carry, has a digest of each source that the code follows from, and under which
versions of Triton it was compiled for sm_90a and read: products in flight, nothing spilled, wide accesses. Docstrings
and comments, which change no code, are no part of a digest.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import tokenize
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent
FILE = PACKAGE / "kernels" / "proven.json"
SOURCES = ("kernels/*.py", "ops/_*_ways.py", "program/block.py")


def sources(package: Path = PACKAGE) -> dict[str, str]:
    """The SHA-256 of the code of each source, by its path in the package."""
    files = sorted(file for pattern in SOURCES for file in package.glob(pattern))
    return {
        str(file.relative_to(package).as_posix()): hashlib.sha256(code_of(file.read_text()).encode()).hexdigest()
        for file in files
    }


def code_of(source: str) -> str:
    """The lines of a source without docstrings, comments and empty lines."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            text = node.body[0]
            for row in range(text.lineno - 1, text.end_lineno or text.lineno):
                lines[row] = ""
    return "\n".join(line.rstrip() for line in lines if line.strip())


def changed(proven: dict[str, Any], now: dict[str, str]) -> list[str]:
    """Sources that are not those whose code was read: other ones, added or removed ones."""
    before = proven["sources"]
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


def add(proven: dict[str, Any] | None, now: dict[str, str], version: str, read: dict[str, Any]) -> dict[str, Any]:
    """The list with what was read under a version of Triton; of other sources nothing stays."""
    kept = {} if proven is None or changed(proven, now) else proven["triton"]
    return {"sources": now, "triton": dict(sorted({**kept, version: read}.items()))}


def describe(file: Path = FILE, package: Path = PACKAGE) -> str:
    """What the list says of the sources at hand."""
    if not file.exists():
        return "not read: no list is here"
    proven = json.loads(file.read_text())
    others = changed(proven, sources(package))
    if others:
        return f"not read: {', '.join(others)} changed since; `make test-gpu-code` reads it"
    versions = (f"{version} ({', '.join(read['plans'])})" for version, read in proven["triton"].items())
    return f"read for sm_90a under Triton {' and '.join(versions)}"
