"""The examples run as they are, on fewer steps, and every picture of the gallery is one that they draw."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent


def example(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.full
@pytest.mark.filterwarnings("error:fastens")
def test_the_gallery(tmp_path, monkeypatch):
    gallery = example("gallery")
    monkeypatch.setattr(gallery, "STEPS", 4)
    monkeypatch.setattr(gallery, "SHOWN", 2)
    gallery.main(tmp_path, [])
    shown = set(re.findall(r"\(gallery/(\w+)\.png\)", (ROOT / "docs" / "gallery.md").read_text()))
    assert len(shown) >= 10
    assert gallery.PICTURES.keys() == {path.stem for path in tmp_path.glob("*.png")}
    assert shown == {path.stem for path in (ROOT / "docs" / "gallery").glob("*.png")}
    assert shown - gallery.PICTURES.keys() == {"forecast", "segmentation"}  # drawn below
    for path in tmp_path.glob("*.png"):
        assert len(Image.open(path).convert("L").getcolors()) > 10  # something is drawn


def test_maps_of_steps(tmp_path, monkeypatch):
    module = example("variance_maps")
    monkeypatch.setattr(module, "STEPS", 3)
    module.main(str(tmp_path / "maps.png"))
    assert Image.open(tmp_path / "maps.png").size[0] > 500


def test_forecasts(tmp_path, monkeypatch, capsys):
    module = example("forecast")
    for name, value in {"MEMBERS": 3, "SAMPLES": 2, "STARTS": 3, "LEADS": 2, "TRAINING_STEPS": 3, "BATCH": 4}.items():
        monkeypatch.setattr(module, name, value)
    module.main(tmp_path)
    assert len(capsys.readouterr().out.splitlines()) == 1 + module.LEADS + 1
    assert len(Image.open(tmp_path / "forecast.png").convert("L").getcolors()) > 10


@pytest.mark.filterwarnings("error:fastens")
def test_segmentation(tmp_path, monkeypatch, capsys):
    module = example("segmentation")
    for name, value in {"MASKS": 3, "TRAINING_STEPS": 2, "BATCH": 4, "TESTED": 3, "SHOWN": 2}.items():
        monkeypatch.setattr(module, name, value)
    module.main(tmp_path)
    assert "AUSE" in capsys.readouterr().out
    assert len(Image.open(tmp_path / "segmentation.png").convert("L").getcolors()) > 10


def test_snapshots_of_a_run_that_goes_on():
    first, second = example("merging").continued(2, 1)
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_enlargements(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "examples" / "super_resolution")  # of its train.py
    module = example("super_resolution/run")
    monkeypatch.delitem(sys.modules, "train")
    for name, value in {"PATCHES": 3, "SAMPLES": 2, "STEPS": 2, "SHOWN": 2}.items():
        monkeypatch.setattr(module, name, value)
    module.main(tmp_path)
    assert "AUSE" in capsys.readouterr().out
    for name in ("maps", "sparsification", "ranks"):
        assert len(Image.open(tmp_path / f"{name}.png").convert("L").getcolors()) > 10
