"""``fastens evaluate``, as a user types it, on little data."""

import csv
import importlib
import json
import re
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fastens.cli import main
from fastens.demo.data import load_digits
from fastens.evaluation import quality
from fastens.evaluation import tables as tables_of
from fastens.evaluation.random_features import RandomFeatures
from fastens.evaluation.report import QUICK
from fastens.evaluation.tables import verdict

likelihood = importlib.import_module("fastens.evaluation.likelihood")  # the package has the function by this name
LITTLE = "--rows 4 --likelihood-rows 3 --noise-levels 2 --ode-steps 2 --sampler-steps 2 --batch 16".split()


@pytest.fixture(scope="module")
def images(folders, tmp_path_factory):
    config = json.loads((Path(folders[0]) / "config.json").read_text())
    size, channels = config["sample_size"], config["in_channels"]
    path = tmp_path_factory.mktemp("data") / "images.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (12, channels, size, size), dtype=np.uint8))
    return path


def arguments_of(folders, images, out):
    return ["evaluate", *folders, "--data", str(images), "--out", str(out), *LITTLE]


@pytest.fixture(scope="module")
def whole(folders, images, tmp_path_factory):
    """What a run that nothing interrupts writes."""
    main(arguments_of(folders, images, out := tmp_path_factory.mktemp("whole")))
    return out


def test_names_with_commas_are_one_cell():
    found, named = {"value": 0.25, "error": 0.5}, "Mean(weights=(0.5, 0.5))"
    of_rule = {**found, "against_member_mean": found, "by_level": []}
    judged = {"members": [found], "by_size": {}, "rules": {named: of_rule}}
    masks = {"rules": {"mean": {**found, "against_off": found}}}
    report = {
        "loss": {**judged, "diversity": found, "times": []},
        "likelihood": judged,
        "quality": {},
        "mc_dropout": {"loss": {"off": found, "fixed": masks, "fresh": masks}, "likelihood": {"off": found}},
        "cost": {"milliseconds": {named: 1.5}},
    }
    head, *rows = csv.reader(tables_of.csv(report).splitlines())
    assert head == ["quantity", "of", "value", "error", "low", "high"]
    assert {len(row) for row in rows} == {6}
    assert ["loss", named, "0.25", "0.5", "", ""] in rows
    assert ["loss, fixed dropout masks, against off", "mean", "0.25", "0.5", "", ""] in rows


def test_report_on_folders(folders, images, whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["members"] == 2
    assert report["loss"]["gain_of_mean"] == pytest.approx(report["loss"]["diversity"]["value"], abs=1e-7)
    assert set(report["likelihood"]["by_size"]) == {"1", "2"}
    assert "no dropout layer" in report["mc_dropout"]["note"]
    page = (tmp_path / "report.md").read_text()
    assert "Not judged: 6 rows on each side are too few for 32 features" in page
    assert "samples of each" not in page
    assert "Members:" not in page  # 2 give the gain of 2
    tables = (tmp_path / "report.tex").read_text()
    assert tables.count(r"\begin{tabular}") == tables.count(r"\end{table}") == 5  # no samples, no dropout
    assert not re.search(r"[^\\][%&]\w|±|_(?!abs)", tables.replace("% \\usepackage", ""))
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "report.csv").read_text().startswith("quantity,of,value")
    assert {len(row) for row in csv.reader((tmp_path / "report.csv").open())} == {6}
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npz")}
    assert len(stamps) > 5
    main(arguments_of(folders, images, tmp_path))  # nothing is computed twice
    assert report["verdict"][0] in capsys.readouterr().out
    assert stamps == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npz")}
    again = json.loads((tmp_path / "report.json").read_text())
    assert again["loss"] == report["loss"]
    assert again["likelihood"] == report["likelihood"]


def test_a_quick_report_judges_samples_of_small_images(folders, tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 256, (80, 1, 8, 8), dtype=np.uint8)
    np.save(data := tmp_path / "data.npy", images)
    little = ["--likelihood-rows", "2", "--rows", "4", "--samples", "40", "--sampler-steps", "1", "--ode-steps", "1"]
    main(["evaluate", *folders, "--data", str(data), "--quick", "--json", "--out", str(tmp_path / "out"), *little])
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report["settings"]["noise_levels"] == QUICK["noise_levels"]
    assert report["settings"]["samples"] == 40
    assert report["quality"]["contenders"].keys() == {"mean", "geometric", "median", "dominant", "member 0", "member 1"}
    assert "no FID" in report["quality"]["note"]
    assert "1/5 loss, 1 of 2" in printed.err
    assert "3/5 quality, 6 of 6" in printed.err


def test_the_verdict_says_how_many_members_suffice():
    report = json.loads((Path(__file__).parents[2] / "docs" / "evaluation" / "digits" / "report.json").read_text())
    assert "and 4 give at least 90 % of it" in " ".join(verdict(report))
    report["loss"]["by_size"]["mean"]["4"] = report["loss"]["by_size"]["mean"]["3"] = report["loss"]["member_mean"]
    assert "of the gain of 5, and fewer than all do not give 90 % of it" in " ".join(verdict(report))


def test_random_features_tell_samples_from_noise():
    train, test = (x[:256] for x in load_digits())
    network = RandomFeatures(1)
    assert all(map(torch.equal, network.parameters(), RandomFeatures(1).parameters()))
    noise = torch.rand(256, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    blurred = torch.nn.functional.avg_pool2d(train, 3, 1, 1)
    found = [float(quality(network(x), network(test), resamples=1).frechet.value) for x in (train, blurred, noise)]
    assert found[0] < 0.2 * found[1]
    assert found[0] < 0.2 * found[2]


def results(out):
    report = json.loads((out / "report.json").read_text())
    return {name: report[name] for name in ("loss", "likelihood", "quality", "mc_dropout")}


def test_interrupted_report_goes_on(folders, images, whole, tmp_path, monkeypatch):
    cut = tmp_path / "cut"
    run, batches = likelihood._batch, []

    def interrupted(*arguments):
        batches.append(arguments)
        if len(batches) == 3:
            raise KeyboardInterrupt
        return run(*arguments)

    monkeypatch.setattr(likelihood, "_batch", interrupted)
    with pytest.raises(SystemExit) as stop:
        main(arguments_of(folders, images, cut))
    assert stop.value.code == 130
    assert not list(cut.glob("report.*"))
    stamps = {path: path.stat().st_mtime_ns for path in cut.rglob("*.npz")}
    assert len(stamps) == 4  # two losses, two batches
    batches.clear()
    monkeypatch.setattr(likelihood, "_batch", lambda *a: batches.append(a) or run(*a))
    main(arguments_of(folders, images, cut))
    assert len(batches) == len(list(whole.rglob("repeat_*.npz"))) - 2  # finished ones are read
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}
    assert results(cut) == results(whole)


def test_full_disk(folders, images, tmp_path, capsys):
    """The system refuses to write beyond a size, in the middle of a file: nothing half-written is taken for whole."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        with pytest.raises(SystemExit) as stop:
            main(arguments_of(folders, images, tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert stop.value.code == 2
    assert "nothing half-written was left" in capsys.readouterr().err.splitlines()[-1]
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".npz"] == []
    main(arguments_of(folders, images, tmp_path))
    assert set(results(tmp_path)["likelihood"]["by_size"]) == {"1", "2"}


def test_report_on_digits(tmp_path):
    main(
        ["evaluate", "digits", "--out", str(tmp_path), *LITTLE, *"--samples 40 --ode-steps 1 --sampler-steps 1".split()]
    )
    report = json.loads((tmp_path / "digits" / "report.json").read_text())
    assert report["members"] == 5
    assert report["loss"]["rules"]["mean"]["value"] < report["loss"]["member_mean"]["value"] < 0.3
    assert report["quality"]["contenders"]["member 4"]["frechet"]["value"] > 0
    page = (tmp_path / "digits" / "report.md").read_text()
    assert "| member 4 |" in page
    assert not re.search(r"\bnan\b", page)
    dropout = report["mc_dropout"]
    assert (dropout["p"], dropout["masks"]) == ([0.1], 5)
    for kind in ("fixed", "fresh"):  # the mean over masks is better than one set of masks, whatever against none
        assert dropout["loss"][kind]["rules"]["mean"]["value"] < dropout["loss"][kind]["one"]["value"] < 0.4
    assert dropout["likelihood"]["off"]["value"] != dropout["likelihood"]["fixed"]["value"]
    assert dropout["samples"]["off"]["frechet"]["value"] != dropout["samples"]["fixed"]["frechet"]["value"]
    assert "| fresh | mean |" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digits", "photographs"], "alone"),
        (["{member}"], "--data is missing"),
        (["{member}", "--data", "nowhere.npy"], "does not exist"),
        (["{member}", "--data", "{text}"], "no .npy file"),
        (["{member}", "--data", "{flat}"], "expected images"),
        (["{member}", "--data", "{wide}"], r"scale the data"),
        (["{member}", "--data", "{last}"], "has images of [8, 8, 1], expected [C, H, W]"),
        (["{member}", "--data", "{images}", "--prediction", "noise"], "epsilon"),
        (["{member}", "--data", "{images}", "--inception", "nowhere.pth"], "nowhere.pth does not exist"),
        (["digits", "--batch", "0"], "--batch is 0"),
        (["digits", "--samples", "10", *LITTLE], "10 generated samples are too few"),
        (["digits", "--out", "{text}/below"], "cannot be written"),
    ],
)
def test_bad_input_is_one_line(arguments, message, folders, images, tmp_path, capsys):
    text, flat, wide = (tmp_path / name for name in ("text.npy", "flat.npy", "wide.npy"))
    text.write_text("no array")
    np.save(flat, np.zeros((8, 3)))
    np.save(last := tmp_path / "last.npy", np.zeros((8, 8, 8, 1), np.float32))
    np.save(wide, np.full((8, 1, 8, 8), 2.0))
    names = {"member": folders[0], "images": images, "text": text, "flat": flat, "wide": wide, "last": last}
    arguments = [argument.format(**names) for argument in arguments]
    if "--out" not in arguments:
        arguments += ["--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", *arguments])
    assert stop.value.code == 2
    printed = capsys.readouterr().err.splitlines()
    assert message in printed[-1]
