"""The GPU benchmarks without a GPU: a rehearsal of one part, resumed; the table, and what of it a page shows."""

import json
import math
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import fastens
from fastens.engine import planned

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # bench is no part of the package

from bench import gpu_contest, gpu_networks, gpu_table  # noqa: E402
from bench.score_networks import NETWORKS, ScoreUNet  # noqa: E402


def gpu_sh(*arguments):
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [ROOT / "bench" / "gpu.sh", *arguments], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.full
def test_a_part_is_rehearsed_end_to_end_and_not_done_twice(tmp_path):
    result = gpu_sh("--rehearse", str(tmp_path), "tests", "mask", "G7_1")
    assert result.returncode == 0, result.stdout + "".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert "left    tests: it needs a GPU, or is for one" in result.stdout
    assert "ok      mask" in result.stdout
    assert "one graph, K replays" in (tmp_path / "table.md").read_text()
    with tarfile.open(tmp_path / "results.tar.gz") as packed:
        assert {"./table.md", "./dropout_ddpmpp_1.json"} <= set(packed.getnames())
    row = json.loads((tmp_path / "dropout_ddpmpp_1.json").read_text())
    assert row["device"] == "cpu rehearsal: no speed"
    assert not row["failed"]
    assert not row["wanted"]
    assert {"torch", "commit", "when", "flops"} <= set(row)
    again = gpu_sh("--rehearse", str(tmp_path), "mask", "G7_1", "no_such_part")
    assert again.stdout.count("done    ") == 2
    assert "no_such_part is no part" in again.stdout
    assert again.returncode == 1
    with pytest.raises(SystemExit, match="expected those of one GPU"):
        gpu_table.keep(tmp_path, tmp_path / "results")


# What calls the ways of convolutions, and a part of each file; the others take minutes, and run the same code.
@pytest.mark.full
@pytest.mark.parametrize("part", ["smoke", "ours", "roofline", "G4", "G4_ways", "G5", "G6", "blocks", "ends"])
def test_a_part_of_each_file_is_rehearsed(part, tmp_path):
    result = gpu_sh("--rehearse", str(tmp_path), part)
    assert f"ok      {part}" in result.stdout, result.stdout + (tmp_path / f"{part}.log").read_text()


def test_a_copy_of_the_tree_without_its_history_does_not_take_parts_for_done(tmp_path):
    script = tmp_path / "tree" / "bench" / "gpu.sh"
    script.parent.mkdir(parents=True)
    script.write_text((ROOT / "bench" / "gpu.sh").read_text())
    environment = {**os.environ, "PYTHON": "true", "GIT_CEILING_DIRECTORIES": str(tmp_path)}
    environment.pop("FASTENS_BENCH_COMMIT", None)
    command = ["bash", script, "--rehearse", tmp_path / "out", "mask"]

    def run():
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout

    assert run().startswith("ok      mask")
    assert run().startswith("done    mask")
    script.write_text(script.read_text() + "\n")
    assert run().startswith("ok      mask")


def test_every_part_is_listed_and_known():
    parts = gpu_sh("--list").stdout.split()
    assert {"G1", "G2", "G3", "G4", "G5", "G6", "G7_1", "G7_16", "sanitizer_memcheck", "sanitizer_racecheck"} <= set(
        parts
    )


def test_goals_come_before_what_they_do_not_need():
    """Half an hour is spent on the goals first, and one build that fails takes no other with it."""
    parts = gpu_sh("--list").stdout.split()
    assert parts.index("smoke") < parts.index("G1") < parts.index("G2") < parts.index("G3")
    assert max(map(parts.index, ("G1", "G2", "G3", "G4"))) < min(map(parts.index, ("library", "forest", "tests")))
    assert parts.index("library") < parts.index("G6")  # which is of the CUDA library


@pytest.fixture
def script(tmp_path):
    """gpu.sh in a tree of its own, with a Python that notes what it is called for and fails at what it is told."""
    path = tmp_path / "tree" / "bench" / "gpu.sh"
    path.parent.mkdir(parents=True)
    path.write_text((ROOT / "bench" / "gpu.sh").read_text())
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/calls\ncase "$*" in *"$FAILS"*) exit 1;; esac\n')
    python.chmod(0o755)

    def run(out, *parts, fails="nothing", **more):
        environment = {**os.environ, "PYTHON": str(python), "FAILS": fails, "FASTENS_BENCH_COMMIT": "a", **more}
        command = ["bash", path, "--rehearse", tmp_path / out, *parts]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    return run


def test_a_part_that_fails_loses_only_itself(script, tmp_path):
    result = script("out", "smoke", "ours", "mask", fails="bench.gpu_ours")
    states = [line.split()[:2] for line in result.stdout.splitlines()]
    assert states == [["ok", "smoke"], ["FAILED", "ours:"], ["ok", "mask"]]
    assert result.returncode == 1
    assert script("out", "smoke", "ours", "mask").returncode == 0


def test_results_are_packed_after_every_part_and_unpacked_on_a_fresh_machine(script, tmp_path):
    packed = tmp_path / "lease" / "results.tar.gz"
    packed.parent.mkdir()
    script("out", "smoke", fails="gpu_table", FASTENS_PACKED=str(packed))
    with tarfile.open(packed) as content:
        assert "./smoke.done" in content.getnames()
    (tmp_path / "fresh").mkdir()
    packed.rename(tmp_path / "fresh" / "results.tar.gz")
    again = script("fresh", "smoke", "ours").stdout.split()
    assert (again[0], again[2]) == ("done", "ok")


def results(**more):
    return {
        "name": "step", "goal": "G1", "shape": "K=5, B=1", "device": "NVIDIA H200", "commit": "abc", "torch": "2.11",
        "seconds": {"ours": [1e-3, 2e-3, 3e-3], "rival 1": [1e-3, 4e-3, 5e-3], "copy": [1e-3, 1e-3, 1e-3]},
        "failed": {"rival 3": "RuntimeError: a | b"}, "wanted": {"rival 1": 2.5, "copy": 0.5}, "complete": True,
        "flops": 4e9, "first call, s": 2.5, "capture, s": 0.25, "peak, GiB": 1.5, **more,
    }  # fmt: skip


def test_results_are_kept_by_device_and_the_table_says_what_was_missed(tmp_path):
    (tmp_path / "step.json").write_text(json.dumps(results()))
    kept = tmp_path / "results"
    assert gpu_table.section(kept) == gpu_table.NOT_MEASURED
    entry = {"conv2d": {"a shape": {"chosen": "triton"}}}
    (tmp_path / "choices.json").write_text(json.dumps({"NVIDIA H200": entry, "another": {}}))
    assert gpu_table.keep(tmp_path, kept, tmp_path / "measured").name == "nvidia-h200.json"
    assert json.loads((tmp_path / "measured" / "nvidia-h200.json").read_text()) == {"NVIDIA H200": entry}
    table = gpu_table.section(kept)
    assert "device NVIDIA H200, torch 2.11, commit abc" in table
    assert "| G1 | K=5, B=1 | rival 1 | 2.000 | 4.000 | 2.00 | 2.5, missed |" in table
    assert "| copy | 2.000 | 1.000 | 0.50 | 0.5 |" in table
    assert "2.0 TFLOP/s" in table
    assert "| first call 2.50 s; capture 0.25 s; peak 1.50 GiB |" in table
    assert "| rival 3 | | RuntimeError: a   b | | |" in table
    (tmp_path / "step.json").write_text(json.dumps(results(complete=False)))
    with pytest.raises(SystemExit, match="not complete: step"):
        gpu_table.keep(tmp_path, kept, tmp_path / "measured")
    with pytest.raises(SystemExit, match="holds no results"):
        gpu_table.read(kept / "none")


def test_the_page_shows_the_results_that_are_kept():
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    assert gpu_table.written(text, gpu_table.section()) == text, "run python -m bench.gpu_table keep DIR"
    with pytest.raises(SystemExit, match=r"has no .<!-- GPU table"):
        gpu_table.written("nothing", "table")


def test_a_rival_that_fails_loses_only_its_own_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_contest, "REHEARSAL", True)
    monkeypatch.setattr(gpu_contest, "OUT", tmp_path)
    monkeypatch.setattr(gpu_contest, "SECONDS", math.inf)
    right, written = torch.ones(3), []

    def slow_to_make():
        written.append(json.loads((tmp_path / "step.json").read_text()))
        return lambda: right

    def does_not_run():
        raise RuntimeError("no\nkernel")

    rivals = {
        "slow": slow_to_make, "wrong": lambda: lambda: 2 * right, "broken": does_not_run,
        "short": lambda: lambda: right[:2], "random": lambda: lambda: 3 * right, "last": slow_to_make,
    }  # fmt: skip
    arguments = ("step", "G1", "B=1", lambda: right, rivals, right, 1e-3, {})
    gpu_contest.contest(*arguments, beside={"copy": lambda: right.clone()}, unlike=["random"])
    row = json.loads((tmp_path / "step.json").read_text())
    assert row["complete"]
    assert list(row["seconds"]) == ["ours", "copy", "slow", "random", "last"]
    assert row["failed"] == {
        "wrong": "1.0e+00 from the reference, so no speed counts", "broken": "RuntimeError: no kernel",
        "short": "gives [2], expected [3]",
    }  # fmt: skip
    first, later = written
    assert (list(first["seconds"]), first["complete"]) == (["ours", "copy"], False)
    assert (list(later["seconds"]), later["complete"]) == (["ours", "copy", "slow", "random"], False)
    with pytest.raises(AssertionError, match=r"step: ours: 1\.0e\+00 from the reference"):
        gpu_contest.contest("step", "", "B=1", lambda: 2 * right, {}, right, 1e-3, {})
    monkeypatch.setattr(gpu_contest, "SECONDS", 0)
    with pytest.raises(AssertionError, match=r"step: slow, .* not run; run the part again"):
        gpu_contest.contest(*arguments)
    assert not json.loads((tmp_path / "step.json").read_text())["complete"]


@pytest.mark.parametrize(("name", "parameters"), [("songunet", 55.7), ("ddpmpp", 62), ("ffhq256", 93.6)])
def test_networks_have_their_published_sizes(name, parameters):
    with torch.device("meta"):
        model = ScoreUNet(**NETWORKS[name])
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, rel=0.01)


def test_networks_are_launches(monkeypatch):
    monkeypatch.setattr(gpu_networks, "REHEARSAL", True)
    monkeypatch.setattr(gpu_networks, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_networks, "DTYPE", torch.float32)
    monkeypatch.setattr(planned, "launches_on", lambda _: True)
    for name in NETWORKS:
        members, (size, *_) = zip(*(gpu_networks.network(name, seed) for seed in range(2)), strict=True)
        ensemble, x, t = fastens.Ensemble(members), torch.randn(1, 3, size, size), torch.tensor([0.5])
        with torch.no_grad():
            found, expected = ensemble(x, t), torch.stack([member(x, t) for member in members]).mean(0)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        (kinds,) = ensemble.report().plans
        torchs = {kind for kind in kinds if kind.startswith("aten")}
        assert torchs <= {"aten.avg_pool2d.default"}, kinds
