"""Whatever stops a writer in the middle, nothing half-written is taken for whole."""

import errno
import json
import os

import numpy as np
import pytest
import torch

import fastens
from fastens import files
from fastens.evaluation.results import Parts
from tests.networks import mlp, randomised


def ensemble(seed=0):
    return fastens.Ensemble([randomised(mlp, seed + k) for k in range(2)])


def forest(seed=0):
    from sklearn.ensemble import RandomForestRegressor

    rows = np.random.default_rng(seed).normal(size=(20, 3))
    return fastens.Forest.from_sklearn(RandomForestRegressor(3, random_state=0).fit(rows, rows))


def picture(path, seed):
    from PIL import Image

    with files.whole(path) as (partial,):
        Image.new("L", (9, 9), seed).save(partial)


WRITERS = {  # what is written into a folder, in two versions
    "text": lambda folder, seed: files.write_whole(folder / "report.md", f"version {seed}\n" * 1000),
    "json": lambda folder, seed: files.write_json(folder / "report.json", {"version": seed}),
    "part": lambda folder, seed: Parts(folder, "key").write("part", {"x": np.full(999, seed)}),
    "ensemble": lambda folder, seed: ensemble(seed).save_pretrained(folder),
    "forest": lambda folder, seed: forest(seed).save(folder / "forest.npz"),
    "picture": lambda folder, seed: picture(folder / "picture.png", seed),
}


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("before", [True, False], ids=["over another", "new"])
@pytest.mark.parametrize("name", WRITERS)
def test_full_disk_leaves_what_was_there(name, before, tmp_path, monkeypatch):
    if before:
        WRITERS[name](tmp_path, 0)
    found = content(tmp_path)
    assert bool(found) == before
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot be written: .*No space left on device"):
        WRITERS[name](tmp_path, 1)
    assert content(tmp_path) == found
    monkeypatch.undo()
    WRITERS[name](tmp_path, 1)
    assert content(tmp_path) != found


@pytest.mark.parametrize("failing", [KeyboardInterrupt, MemoryError, OSError(errno.ENOSPC, "No space left on device")])
def test_stopped_in_the_middle(failing, tmp_path):
    path = tmp_path / "file"
    path.write_text("before")

    def stopped():
        with files.whole(path) as (partial,):
            partial.write_text("half of a ")
            raise failing

    with pytest.raises(type(failing) if isinstance(failing, Exception) else failing):
        stopped()
    assert content(tmp_path) == {path.relative_to(tmp_path): b"before"}


@pytest.mark.parametrize("stop", [1, 2], ids=["before the weights", "between weights and description"])
def test_ensemble_of_two_versions_is_not_loaded(stop, tmp_path, monkeypatch):
    """Weights of one ensemble beside the rule of another would be an ensemble that nobody saved."""
    first = ensemble(0)
    first.save_pretrained(tmp_path)
    second = ensemble(7)
    second.rule = "median"
    replace, calls = os.replace, []

    def interrupted(*paths):
        calls.append(paths)
        if len(calls) == stop:
            raise KeyboardInterrupt
        replace(*paths)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        second.save_pretrained(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=r"config\.json"):
        fastens.Ensemble.from_pretrained(tmp_path, factory=mlp)
    monkeypatch.undo()
    second.save_pretrained(tmp_path)
    x = torch.ones(2, 5)
    assert torch.equal(fastens.Ensemble.from_pretrained(tmp_path, factory=mlp)(x), second(x))


def test_missing_folders_are_made(tmp_path):
    files.write_json(tmp_path / "a" / "b.json", {"x": 1}, sort_keys=True)
    assert json.loads((tmp_path / "a" / "b.json").read_text()) == {"x": 1}


def test_every_writer_goes_through_it():
    """No module of the package opens a file for writing by itself, but builds, which ninja makes again."""
    import ast
    from pathlib import Path

    package = Path(fastens.__file__).parent
    allowed = {"files.py", "_build.py"}
    inside = {"write_text", "write_bytes", "savefig", "savez", "save_file", "dump"}
    for path in package.rglob("*.py"):
        if path.relative_to(package).as_posix() in allowed:
            continue
        tree = ast.parse(path.read_text())
        guarded = {
            id(call)
            for block in ast.walk(tree)
            if isinstance(block, ast.With) and any("whole(" in ast.unparse(item) for item in block.items)
            for call in ast.walk(block)
        }
        for call in ast.walk(tree):
            name = call.func.attr if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) else ""
            if name in inside and id(call) not in guarded:
                given = ast.unparse(call.args[0]) if call.args else ""
                assert given in ("buffer", "file"), f"{path}:{call.lineno} writes {given} by itself"
