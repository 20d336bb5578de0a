"""The command line, as a user types it."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from fastens.cli import main
from fastens.ops import _choice
from fastens.ops.run_program import target
from tests.networks import randomised, unet_2d


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("members")
    for seed in range(2):
        randomised(lambda: unet_2d(False), seed).save_pretrained(root / f"member_{seed}")
    return [str(root / f"member_{seed}") for seed in range(2)]


def test_info(capsys, monkeypatch, tmp_path):
    choices = {
        "NVIDIA H200": {"conv": {"a": {"chosen": "grouped"}, "b": {"chosen": "members"}, "c": {"chosen": "members"}}}
    }
    (tmp_path / "choices.json").write_text(json.dumps(choices))
    monkeypatch.setenv("FASTENS_CACHE", str(tmp_path))
    monkeypatch.setattr(_choice.TABLE, "_content", None)
    main(["info"])
    printed = capsys.readouterr().out
    assert f"torch {torch.__version__}" in printed
    assert "backend reference: available" in printed
    assert "measured choices of conv on NVIDIA H200: 1 grouped, 2 members" in printed
    assert f"plans: run on {target()}; bfloat16 is" in printed or "plans: none" in printed
    assert "extra [tabular]: installed" in printed  # whichever distribution brings xgboost


@pytest.mark.skipif(not target(), reason="no compiled library")
def test_info_names_a_target_that_is_not_there():
    command = [sys.executable, "-m", "fastens", "info"]
    environment = {**os.environ, "FASTENS_CPU_TARGET": "avx1024"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "plans: none; FASTENS_CPU_TARGET: 'avx1024' is no target of this build, which has" in result.stdout


def test_sample_is_reproducible(folders, tmp_path):
    for name in ("a", "b"):
        main(["sample", *folders, "--rule", "median", "--num", "3", "--steps", "2", "--out", str(tmp_path / name)])
    first, second = (np.load(tmp_path / name / "samples.npy") for name in ("a", "b"))
    assert first.shape == (3, 8, 8, 1)
    assert np.array_equal(first, second)
    assert len(list((tmp_path / "a").glob("*.png"))) == 3
    assert json.loads((tmp_path / "a" / "samples.json").read_text())["rule"] == "median"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "nowhere"], "nowhere does not exist"),
        (["sample", "{member}", "--rule", "medain"], "median"),
        (["sample", "{member}", "--out", "{file}/below"], "cannot be written"),
        (["demo", "--out", "{file}/below"], "cannot be written"),
    ],
)
def test_bad_input_is_one_line(arguments, message, folders, tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    arguments = [a.format(member=folders[0], file=file) for a in arguments]
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
