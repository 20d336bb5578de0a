"""How kernels follow one another: each waits for the one before, before it does anything else."""

import ast
from pathlib import Path

import pytest

import fastens

KERNELS = sorted((Path(fastens.__file__).parent / "kernels").glob("*.py"))


NODES = [node for path in KERNELS for node in ast.walk(ast.parse(path.read_text()))]


def launched():
    """The names of what is launched: called behind a grid in brackets."""
    calls = [node.func for node in NODES if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)]
    return {call.value.id for call in calls if isinstance(call.value, ast.Name)}


LAUNCHED = launched()
FUNCTIONS = {node.name: node for node in NODES if isinstance(node, ast.FunctionDef) and node.name in LAUNCHED}


def test_what_is_launched_is_found():
    assert {"conv2d_kernel", "conv2d_tma_kernel", "normalise_kernel", "aggregate_kernel"} <= set(FUNCTIONS)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_kernel_waits_first(name):
    """Compiled, that is the order of its machine code too: tests/kernels/test_ahead_of_time.py."""
    function = FUNCTIONS[name]
    assert [ast.unparse(decorator).partition("(")[0] for decorator in function.decorator_list] == ["kernel"]
    _docstring, first, *_ = function.body
    assert ast.unparse(first) == "wait_for_previous()"
