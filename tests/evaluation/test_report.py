"""``fastens evaluate``, as a user types it, on little data."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from fastens.cli import main
from tests.networks import randomised, unet_2d

LITTLE = "--rows 4 --likelihood-rows 3 --noise-levels 2 --ode-steps 2 --sampler-steps 2 --batch 16".split()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("members")
    for seed in range(2):
        randomised(lambda: unet_2d(False), seed).save_pretrained(root / f"member_{seed}")
    return [str(root / f"member_{seed}") for seed in range(2)]


@pytest.fixture(scope="module")
def images(folders, tmp_path_factory):
    config = json.loads((Path(folders[0]) / "config.json").read_text())
    size, channels = config["sample_size"], config["in_channels"]
    path = tmp_path_factory.mktemp("data") / "images.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (12, channels, size, size), dtype=np.uint8))
    return path


def test_report_on_folders(folders, images, tmp_path, capsys):
    arguments = ["evaluate", *folders, "--data", str(images), "--out", str(tmp_path), *LITTLE]
    main(arguments)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["members"] == 2
    assert report["loss"]["gain_of_mean"] == pytest.approx(report["loss"]["diversity"]["value"], abs=1e-7)
    assert set(report["likelihood"]["by_size"]) == {"1", "2"}
    assert "no dropout layer" in report["mc_dropout"]["note"]
    assert "not judged" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "report.csv").read_text().startswith("quantity,of,value")
    assert report["verdict"][0] in capsys.readouterr().out
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npz")}
    assert len(stamps) > 5
    main(arguments)  # nothing is computed twice
    assert stamps == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npz")}
    again = json.loads((tmp_path / "report.json").read_text())
    assert again["loss"] == report["loss"]
    assert again["likelihood"] == report["likelihood"]


def test_report_on_digits(tmp_path):
    main(["evaluate", "digits", "--out", str(tmp_path), *LITTLE, "--samples", "40"])
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
    np.save(wide, np.full((8, 1, 8, 8), 2.0))
    names = {"member": folders[0], "images": images, "text": text, "flat": flat, "wide": wide}
    arguments = [argument.format(**names) for argument in arguments]
    if "--out" not in arguments:
        arguments += ["--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", *arguments])
    assert stop.value.code == 2
    printed = capsys.readouterr().err.splitlines()
    assert message in printed[-1]
