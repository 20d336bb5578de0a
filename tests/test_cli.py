"""The command line, as a user types it."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from PIL import Image

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


@pytest.mark.parametrize("shared", [[], ["--shared-noise"]], ids=["own_noise", "shared_noise"])
def test_sample_of_each_member(folders, tmp_path, shared):
    out = tmp_path / "out"
    main(["sample", *folders, "--per-member", "3", *shared, "--steps", "2", "--seed", "4", "--out", str(out)])
    samples = np.load(out / "samples.npy")
    assert samples.shape == (2, 3, 8, 8, 1)
    if shared:
        pipe = DDIMPipeline(UNet2DModel.from_pretrained(folders[1]), DDIMScheduler(num_train_timesteps=1000))
        alone = pipe(3, torch.Generator().manual_seed(4), num_inference_steps=2, output_type="np").images
        np.testing.assert_allclose(samples[1], alone, atol=1e-4)
    assert Image.open(out / "members.png").size == (24, 16)  # a row for each member
    assert (out / "maps.png").stat().st_size > 1000
    said = json.loads((out / "samples.json").read_text())
    name = "diffusion_pytorch_model.safetensors"
    digest = hashlib.sha256((Path(folders[0]) / name).read_bytes()).hexdigest()
    assert said["checkpoints"][0]["sha256"][name] == digest
    assert (said["seed"], said["shared_noise"], said["versions"]["torch"]) == (4, bool(shared), torch.__version__)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "{member}", "--shared-noise"], "--shared-noise is of --per-member N"),
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
