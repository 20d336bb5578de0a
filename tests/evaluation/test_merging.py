"""Merging against ensembling: a study of a run's snapshots, and ``fastens evaluate RUN_FOLDER``."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import fastens
from fastens.cli import main
from fastens.evaluation import Denoiser, denoising_loss, merge_loss
from fastens.evaluation.merging import BEST, ENSEMBLE, STUDENT, Contender, MergeStudy, merge_study
from fastens.evaluation.run_folder import RunMembers, snapshots
from fastens.schedules import Discrete
from tests.networks import randomised, small_unet


def images(rows, seed=0):
    return torch.rand(rows, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder as diffusers' scripts write it: weights and averages of three snapshots, and other files."""
    root = tmp_path_factory.mktemp("run")
    for number, step in enumerate((500, 1000, 2000)):
        for name, seed in (("unet", number), ("unet_ema", 10 + number)):
            randomised(small_unet, seed).save_pretrained(root / f"checkpoint-{step}" / name)
    (root / "logs").mkdir()
    (root / "random_states_0.pkl").write_bytes(b"")
    (root / "random_states_1.pkl").write_bytes(b"")
    return root


def test_snapshots_are_found_in_order(run, tmp_path):
    assert [path.name for path in snapshots(run)] == ["checkpoint-500", "checkpoint-1000", "checkpoint-2000"]
    names = [
        "network-snapshot-000100-0.050.pkl",
        "network-snapshot-000100-0.100.pkl",
        "network-snapshot-000020-0.050.pkl",
    ]
    for name in [*names, "training-state-000100.pt", "training-state-000020.pt", "model-00001-of-00002.safetensors"]:
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in snapshots(tmp_path)] == [names[2], names[0], names[1]]
    assert snapshots(run / "checkpoint-500" / "unet") == []


def test_weights_and_averages_are_members(run):
    members = RunMembers(snapshots(run))
    assert members.names[:3] == ["checkpoint-500 (average)", "checkpoint-500 (weights)", "checkpoint-1000 (average)"]
    for k, seed in enumerate((10, 0, 11, 1, 12, 2)):
        expected = randomised(small_unet, seed).state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in members[k].state_dict().items())
    assert len(RunMembers(snapshots(run), raw=True)) == 3


def test_one_set_of_weights_is_one_member(tmp_path):
    for step in (1, 2):
        randomised(small_unet, step).save_pretrained(tmp_path / f"step_{step}")
    assert RunMembers(snapshots(tmp_path)).names == ["step_1", "step_2"]


def test_merge_loss_is_the_denoising_loss_of_each_candidate():
    members = [randomised(small_unet, seed) for seed in range(2)]
    loss = merge_loss(images(6), Discrete.linear(), rows=8)
    with torch.no_grad():
        both = loss(fastens.Ensemble(members))
        for k, member in enumerate(members):
            torch.testing.assert_close(both[k], loss(fastens.Ensemble([member]))[0], rtol=1e-4, atol=1e-6)
        assert torch.equal(both, loss(fastens.Ensemble(members)))
        fresh = merge_loss(images(6), Discrete.linear(), rows=8, fresh=True)
        assert not torch.equal(fresh(fastens.Ensemble(members)), fresh(fastens.Ensemble(members)))


def test_a_study_in_groups_is_that_of_all_at_once():
    members = [randomised(small_unet, seed) for seed in range(3)]
    few = {"times": 2, "steps": 1}
    whole, parts = (
        merge_study(members, images(8), images(6, 1), Discrete.linear(), pool=pool, **few) for pool in (3, 2)
    )
    np.testing.assert_allclose(parts.members, whole.members, rtol=1e-5)
    assert len(parts.pool) == 2
    assert parts.contenders[ENSEMBLE].evaluations == 2
    assert STUDENT not in whole.contenders
    found = denoising_loss(Denoiser(fastens.Ensemble(members), Discrete.linear()), images(6, 1), times=2).rules["mean"]
    np.testing.assert_allclose(whole.contenders[ENSEMBLE].rows, found.mean(1), rtol=1e-5)
    merged = denoising_loss(Denoiser(fastens.merge(members), Discrete.linear()), images(6, 1), times=2).members[0]
    np.testing.assert_allclose(whole.contenders["uniform merge"].rows, merged.mean(1), rtol=1e-4)


def study_of(**losses):
    """A study whose contenders have these losses, a little noise on each row."""
    noise = np.random.default_rng(0).normal(0, 0.01, 200)
    contenders = {name: Contender(value + noise, 1, 1.0, "") for name, value in losses.items()}
    contenders[ENSEMBLE] = Contender(contenders[ENSEMBLE].rows, 2, 2.0, "")
    weights = {"uniform": {"": (0.5, 0.5)}, "greedy": {"": (0.0, 1.0)}, "fitted": {"": (0.4, 0.6)}}
    return MergeStudy(np.stack([1.0 + noise, 1.1 + noise]), [0, 1], contenders, weights)


def test_the_verdict_says_what_the_intervals_show():
    merges = {"uniform merge": 0.9, "greedy merge": 1.0, "fitted merge": 0.91}
    works = study_of(**{BEST: 1.0, ENSEMBLE: 0.9, STUDENT: 0.95}, **merges)
    text = " ".join(works.verdict())
    assert "Merging works here: the uniform merge changes the best single member's loss by -10.0 %" in text
    assert "at 2.0 times the cost, and is not told apart from the uniform merge" in text
    assert "keeps 67 %" in text  # of the way from 1.05 to 0.9
    assert works.kept(STUDENT).value == pytest.approx(2 / 3, abs=0.01)
    fails = study_of(**{BEST: 1.0, ENSEMBLE: 0.9, "uniform merge": 5.0, "greedy merge": 1.0, "fitted merge": 2.0})
    text = " ".join(fails.verdict())
    assert "Merging fails here: the best of the merges (greedy merge) is no better" in text
    assert "do not lie in one basin: the uniform merge changes the loss by +" in text
    assert "better than the greedy merge" in text


def test_evaluate_a_run_folder(run, tmp_path, capsys):
    np.save(tmp_path / "images.npy", images(8).numpy())
    little = ["--data", str(tmp_path / "images.npy"), "--quick", "--noise-levels", "2", "--pool", "2", "--distill", "1"]
    main(["evaluate", str(run), "--out", str(tmp_path / "out"), "--quiet", *little])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    (study,) = report["studies"].values()
    assert len(study["members"]) == len(report["snapshots"]) == 6
    names = {BEST, "uniform merge", "greedy merge", "fitted merge", STUDENT, ENSEMBLE}
    assert set(study["contenders"]) == names
    printed, page = capsys.readouterr().out, (tmp_path / "out" / "report.md").read_text()
    for said in study["verdict"]:
        assert said in printed
        assert said in page
    assert all(f"| {name} |" in page for name in names)
    assert (tmp_path / "out" / "report.png").read_bytes().startswith(b"\x89PNG")


def test_what_a_run_folder_cannot_take(run, tmp_path, capsys):
    np.save(tmp_path / "images.npy", np.zeros((8, 3, 8, 8), np.float32))
    data = ["--data", str(tmp_path / "images.npy"), "--quiet", "--out", str(tmp_path / "out")]
    for arguments, said in (
        ([str(run), *data], "expected [C, H, W] as the members take them"),
        ([str(run), *data, "--student", "x", "--distill", "2"], "give one of them"),
        ([str(run / "checkpoint-500" / "unet"), *data, "--distill", "2"], "are of a run's folder"),
        ([str(run)], "--data is missing"),
    ):
        with pytest.raises(SystemExit):
            main(["evaluate", *arguments])
        assert said in capsys.readouterr().err
    with pytest.raises(ValueError, match="at least two of each"):
        merge_study([small_unet()], images(4), images(4), Discrete.linear())


def test_the_report_that_ships_keeps_its_word():
    page = Path(__file__).resolve().parents[2] / "docs" / "evaluation" / "merging"
    run, seeds = json.loads((page / "report.json").read_text())["studies"].values()
    best = [run["contenders"][name]["against_best_single_percent"] for name in run["contenders"] if "merge" in name]
    assert min(found["high"] for found in best) < 0  # merging works along one run
    assert seeds["contenders"]["uniform merge"]["against_best_single_percent"]["low"] > 100  # and fails across seeds
    assert seeds["contenders"][STUDENT]["kept_of_the_gain"]["value"] >= 0.7
    text = (page / "report.md").read_text()
    assert all(said in text for study in (run, seeds) for said in study["verdict"])
