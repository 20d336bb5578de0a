"""The file of measurements: several processes at a time, and contents that are no measurements."""

import json

import pytest
import torch

from fastens.ops._table import Table
from tests.fresh import python
from tests.ops.test_choice import CPU, X, choice, registry  # noqa: F401

WRITERS = """
import os, pathlib, sys
from fastens.ops._table import Table
begin, go = os.pipe()
for name in range(6):
    if not os.fork():
        os.close(go)
        os.read(begin, 1)  # until nobody holds the other end: they begin together
        for i in range(40):
            Table(pathlib.Path(sys.argv[1])).add("cpu", "add", f"{name} {i}", {"chosen": "fast"})
        os._exit(0)
os.close(go)
sys.exit(any(os.wait()[1] for name in range(6)))
"""


def test_several_processes_lose_nothing(tmp_path):
    path = tmp_path / "choices.json"
    Table(path).add("cpu", "add", "first", {"chosen": "slow"})
    result = python(WRITERS, path)
    assert result.returncode == 0, result.stderr
    assert len(Table(path).content["cpu"]["add"]) == 1 + 6 * 40
    assert [path.name for path in tmp_path.iterdir()] == ["choices.json"]


SHAPES = ({}, [], None, 3, "text", [[1]])


@torch.no_grad()
@pytest.mark.parametrize("level", ["file", "device", "op", "entry", "chosen"])
@pytest.mark.parametrize("wrong_shape", SHAPES, ids=str)
def test_what_has_another_shape_is_no_measurement(tmp_path, level, wrong_shape):
    """Each level of the table in turn is something else: it is measured again, and what is sound beside it stays."""
    chosen = wrong_shape if level == "chosen" and not isinstance(wrong_shape, str) else 1
    entry = {"chosen": chosen} if level == "chosen" else wrong_shape
    keys = {"[6]": entry, "[1]": {"chosen": "slow"}} if level in ("entry", "chosen") else wrong_shape
    ops = wrong_shape if level == "device" else {"add": keys}
    path = tmp_path / "choices.json"
    content = {"cpu": ops, "gpu": {"add": {"k": {"chosen": "a"}}}}
    path.write_text(json.dumps(wrong_shape if level == "file" else content))
    add = choice(path)
    add.table.summary()
    assert add.choose((X,), CPU) == "fast"
    stored = json.loads(path.read_text())
    assert stored["cpu"]["add"]["[6]"]["chosen"] == "fast"
    assert level == "file" or stored["gpu"] == {"add": {"k": {"chosen": "a"}}}
    assert level not in ("entry", "chosen") or stored["cpu"]["add"]["[1]"] == {"chosen": "slow"}


@torch.no_grad()
@pytest.mark.parametrize("text", [b"\xff\xfe", b"[" * 100000, b"", b"{"], ids=["no UTF-8", "deep", "empty", "cut"])
def test_what_is_no_json_is_no_measurement(tmp_path, text):
    (tmp_path / "choices.json").write_bytes(text)
    assert choice(tmp_path / "choices.json").choose((X,), CPU) == "fast"
