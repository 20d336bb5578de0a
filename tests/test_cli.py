"""The command line, as a user types it."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DConditionModel, UNet2DModel
from PIL import Image

import fastens
from fastens.cli import main
from fastens.ops import _choice
from fastens.ops.run_program import target, why_target
from fastens.provenance import provenance
from tests.fresh import python


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
    assert f"instruction set of the compiled kernels: {why_target()}" in printed or "plans: none" in printed
    assert "extra [tabular]: installed" in printed  # whichever distribution brings xgboost


@pytest.mark.skipif(not target(), reason="no compiled library")
def test_info_names_a_target_that_is_not_there():
    command = 'import runpy; runpy.run_module("fastens", run_name="__main__", alter_sys=True)'
    result = python(command, "info", FASTENS_CPU_TARGET="avx1024")
    assert result.returncode == 0, result.stderr
    assert "plans: none; FASTENS_CPU_TARGET: 'avx1024' is no target of this build, which has" in result.stdout


def test_sample_is_reproducible(folders, tmp_path):
    for name in ("a", "b"):
        main(["sample", *folders, "--rule", "median", "--num", "3", "--steps", "2", "--out", str(tmp_path / name)])
    first, second = (np.load(tmp_path / name / "samples.npy") for name in ("a", "b"))
    assert first.shape == (3, 1, 8, 8)
    assert np.array_equal(first, second)
    assert len(list((tmp_path / "a").glob("sample_*.png"))) == 3
    assert Image.open(tmp_path / "a" / "samples.png").size == (128, 128)  # three of them, two in a row
    assert json.loads((tmp_path / "a" / "samples.json").read_text())["rule"] == {"rule": "median", "even": "average"}


def test_sample_is_the_pipelines(folders, tmp_path):
    main(["sample", *folders, "--num", "3", "--steps", "2", "--seed", "5", "--out", str(tmp_path), "--quiet"])
    pipe = DDIMPipeline(fastens.Ensemble(folders), DDIMScheduler(num_train_timesteps=1000))
    images = pipe(3, torch.Generator().manual_seed(5), num_inference_steps=2, output_type="np").images
    found = np.load(tmp_path / "samples.npy").transpose(0, 2, 3, 1) / 2 + 0.5
    np.testing.assert_allclose(found, images, atol=1e-5)


def test_files_of_training_code_are_sampled_and_evaluated(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for k, folder in enumerate(folders):
        state = UNet2DModel.from_pretrained(folder).state_dict()
        torch.save({"state_dict": {f"model.{name}": tensor for name, tensor in state.items()}}, f"run{k}.ckpt")
    scheduler = DDIMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")
    DDIMPipeline(UNet2DModel.from_pretrained(folders[0]), scheduler).save_pretrained("pipe")
    main(["sample", "run*.ckpt", "--like", "pipe", "--num", "6", "--steps", "2", "--out", "files"])
    main(["sample", *folders, "--scheduler", "pipe/scheduler", "--num", "6", "--steps", "2", "--out", "folders"])
    plain = np.load("files/samples.npy")
    main(["sample", "pipe", folders[1], "--num", "6", "--steps", "2", "--out", "pipes"])
    found, wanted = (np.load(f"{name}/samples.npy") for name in ("pipes", "folders"))
    np.testing.assert_allclose(found, wanted, atol=1e-6)  # a pipeline's own scheduler, and one that is named
    assert not np.allclose(plain, wanted, atol=1e-2)  # else linear beta
    little = "--rows 2 --likelihood-rows 2 --noise-levels 2 --ode-steps 1 --batch 8 --quiet".split()
    main(["evaluate", "run*.ckpt", "--like", "pipe", "--data", "files/samples.npy", "--out", "report", *little])
    report = json.loads(Path("report/report.json").read_text())
    assert report["members"] == 2
    made = report["provenance"]
    assert [len(each["sha256"]) for each in made["checkpoints"]] == [1, 1]
    assert made["checkpoints"][0]["path"] == "run0.ckpt"
    assert made["checkpoints"][0]["sha256"]["run0.ckpt"] == hashlib.sha256(Path("run0.ckpt").read_bytes()).hexdigest()


def test_a_result_names_its_checkpoints_from_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    for path in (tmp_path / "run" / "a.ckpt", tmp_path / "b.ckpt"):
        path.write_bytes(b"weights")
    monkeypatch.chdir(tmp_path / "run")
    found = provenance([tmp_path / "run" / "a.ckpt", "a.ckpt", tmp_path / "b.ckpt"])["checkpoints"]
    assert [each["path"] for each in found] == ["a.ckpt", "a.ckpt", str(tmp_path / "b.ckpt")]


@pytest.mark.parametrize("arguments", [["info"], ["sample", "{}", "--num", "1", "--steps", "1"]], ids=lambda a: a[0])
def test_json_is_all_that_is_printed(arguments, folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main([argument.format(folders[0]) for argument in arguments] + ["--json"])
    assert isinstance(json.loads(capsys.readouterr().out), dict)


@pytest.mark.parametrize("command", ["demo", "info", "inspect", "sample", "evaluate", "tune", "bench", "completion"])
def test_help_names_defaults_and_examples(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert f"  fastens {command}" in printed.partition("examples:")[2]
    if command == "sample":
        assert "(default: mean)" in " ".join(printed.split())
        assert all(rule in printed for rule in fastens.rules.names())


def test_version_and_completion(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"fastens {fastens.__version__}\n"
    pytest.importorskip("shtab")
    main(["completion", "bash"])
    assert "--per-member" in capsys.readouterr().out


def test_an_interrupt_has_its_own_status(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("fastens.cli.info.gather", interrupted)
    with pytest.raises(SystemExit) as stop:
        main(["info"])
    assert stop.value.code == 130


def test_what_is_missing_is_said_before_any_work(folders, tmp_path, monkeypatch, capsys):
    def missing(extra):
        return ["torchdiffeq"] if extra == "metrics" else []

    monkeypatch.setattr("fastens.cli.missing", missing)
    with pytest.raises(SystemExit):
        main(["evaluate", *folders, "--data", "nowhere.npy", "--out", str(tmp_path / "out")])
    assert capsys.readouterr().err == (
        "fastens: torchdiffeq not installed: pip install 'fastens[metrics,diffusers,plot]'\n"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shared", [[], ["--shared-noise"]], ids=["own_noise", "shared_noise"])
def test_sample_of_each_member(folders, tmp_path, shared):
    out = tmp_path / "out"
    main(["sample", *folders, "--per-member", "3", *shared, "--steps", "2", "--seed", "4", "--out", str(out)])
    samples = np.load(out / "samples.npy")
    assert samples.shape == (2, 3, 1, 8, 8)
    if shared:
        pipe = DDIMPipeline(UNet2DModel.from_pretrained(folders[1]), DDIMScheduler(num_train_timesteps=1000))
        alone = pipe(3, torch.Generator().manual_seed(4), num_inference_steps=2, output_type="np").images
        np.testing.assert_allclose(samples[1].transpose(0, 2, 3, 1) / 2 + 0.5, alone, atol=1e-4)
    assert Image.open(out / "members.png").size == (192, 128)  # a row for each member
    assert (out / "maps.png").stat().st_size > 1000
    said = json.loads((out / "samples.json").read_text())
    name = "diffusion_pytorch_model.safetensors"
    digest = hashlib.sha256((Path(folders[0]) / name).read_bytes()).hexdigest()
    made = said["provenance"]
    assert made["checkpoints"][0]["sha256"][name] == digest
    assert (made["seed"], said["shared_noise"], made["versions"]["torch"]) == (4, bool(shared), torch.__version__)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "{member}", "--shared-noise"], "--shared-noise is of --per-member N"),
        (["sample", "nowhere"], "nowhere does not exist"),
        (["sampel", "nowhere"], "did you mean sample?"),
        (["sample", "nowhere", "--stpes", "3"], "did you mean --steps?"),
        (["sample", "{member}", "--device", "nonsense"], "--device nonsense"),
        (["sample", "{state}"], "is a file of weights; say what its network is, by --like FOLDER or --factory"),
        (["sample", "{state}", "--like", "{file}"], "has no config.json"),
        (
            ["sample", "{parent}"],
            "holds the models member_0, member_1: say which by --key, as in --key 'member_0'; if each is",
        ),
        (["sample", "{nested}"], "it has the folders run0, run1: if they are the members, pass them"),
        (["sample", "{state}", "--factory", "nowhere:net"], "expected MODULE:FUNCTION"),
        (["sample", "{conditional}"], "the members need encoder_hidden_states"),
        (["sample", "{member}", "--rule", "medain"], "median"),
        (["sample", "{member}", "--out", "{file}/below"], "cannot be written"),
        (["demo", "--out", "{file}/below"], "cannot be written"),
    ],
)
def test_bad_input_is_one_line(arguments, message, folders, tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    torch.save({}, state := tmp_path / "state.pt")
    conditional = tmp_path / "conditional"
    if "{conditional}" in arguments:
        widths = {"block_out_channels": (8, 8), "norm_num_groups": 4, "cross_attention_dim": 8, "attention_head_dim": 4}
        blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
        UNet2DConditionModel(sample_size=8, **widths, **blocks).save_pretrained(conditional)
    names = {"member": folders[0], "file": file, "state": state, "conditional": conditional}
    names |= {"parent": Path(folders[0]).parent, "nested": tmp_path / "nested"}
    for k in range(2):
        (tmp_path / f"nested/run{k}/unet").mkdir(parents=True)
    arguments = [a.format(**names) for a in arguments]
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
