"""The command line, as a user types it."""

import json

import numpy as np
import pytest
import torch

from fastens.cli import main
from tests.networks import randomised, unet_2d


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("members")
    for seed in range(2):
        randomised(lambda: unet_2d(False), seed).save_pretrained(root / f"member_{seed}")
    return [str(root / f"member_{seed}") for seed in range(2)]


def test_info(capsys):
    main(["info"])
    printed = capsys.readouterr().out
    assert f"torch {torch.__version__}" in printed
    assert "backend reference: available" in printed
    assert "extra [tabular]: installed" in printed  # whichever distribution brings xgboost


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
