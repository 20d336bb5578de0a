"""The list of what was read of GPU kernels' machine code: of which sources, and that others are not taken for them."""

import json
import re

import pytest

from fastens import proven

READ = {"target": "sm_90a", "plans": ["songunet:1"]}


@pytest.fixture
def package(tmp_path):
    for name in ("kernels/conv2d.py", "ops/_tma_ways.py", "ops/conv2d.py", "program/block.py"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"name = {name!r}\n")
    return tmp_path


def test_versions_add_up_while_the_sources_are_the_same(package):
    now = proven.sources(package)
    assert list(now) == ["kernels/conv2d.py", "ops/_tma_ways.py", "program/block.py"]
    found = proven.add(proven.add(None, now, "3.7.1", READ), now, "3.6.0", READ)
    file = package / "proven.json"
    file.write_text(json.dumps(found))
    assert list(found["triton"]) == ["3.6.0", "3.7.1"]
    assert proven.describe(file, package) == "read for sm_90a under Triton 3.6.0 (songunet:1) and 3.7.1 (songunet:1)"


@pytest.mark.parametrize("change", ["write", "unlink", "add"])
def test_other_sources_are_not_taken_for_those_that_were_read(package, change):
    file = package / "proven.json"
    file.write_text(json.dumps(proven.add(None, proven.sources(package), "3.7.1", READ)))
    source = package / "kernels" / ("new.py" if change == "add" else "conv2d.py")
    source.unlink() if change == "unlink" else source.write_text("changed")
    assert re.fullmatch(rf"not read: kernels/{source.name} changed since; .*", proven.describe(file, package))
    again = proven.add(json.loads(file.read_text()), proven.sources(package), "3.6.0", READ)
    assert list(again["triton"]) == ["3.6.0"]  # nothing of the sources before


SOURCE = '''"""A module."""

import torch  # a comment


def kernel(x):
    """What it does,

    and why.
    """
    text = """no docstring"""  # noqa
    return x, text, "# no comment"
'''


def test_docstrings_and_comments_are_no_code():
    lines = ["import torch", "def kernel(x):", '    text = """no docstring"""', '    return x, text, "# no comment"']
    assert proven.code_of(SOURCE).splitlines() == lines
    assert proven.code_of(SOURCE.replace("and why", "and what for").replace("  # noqa", "")).splitlines() == lines
    assert proven.code_of(SOURCE.replace("no docstring", "other")).splitlines() != lines


def test_a_list_is_here_and_is_of_sources_that_are_known():
    found = json.loads(proven.FILE.read_text())
    assert found["triton"]
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in found["sources"].values())
    assert "no list" in proven.describe(proven.FILE.with_name("none.json"))
