"""The tabular finding on a small scale: what is measured, that a run goes on, and its report."""

import csv

import numpy as np
import pytest

from fastens.cli import main
from fastens.tabular import finding, finding_report

SMALL = finding.Settings(("iris",), seeds=2, levels=3, trees=3, depth=2, tables=1, copies=2)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(finding, "real_versus_generated", lambda *_: 0.5)
    monkeypatch.setattr(finding, "downstream", lambda *_: 0.25)


def test_a_run_goes_on_and_is_reported(quick, monkeypatch, tmp_path):
    records = finding.run(SMALL, tmp_path, shown=False)
    settings = {"depth 2", "unlimited depth", "deterministic", "training rows"}
    assert {record["setting"] for record in records} == settings
    contenders = {record["contender"] for record in records if record["setting"] == "depth 2"}
    assert contenders == {*finding.RULES, *finding.CORRECTED}
    monkeypatch.setattr(finding, "measure", lambda *_: pytest.fail("measured again"))
    assert finding.run(SMALL, tmp_path, shown=False) == records

    lines = finding_report.write(records, SMALL, tmp_path)
    assert len(lines) == 3
    assert (tmp_path / "report.png").stat().st_size > 0
    assert all(line in (tmp_path / "report.md").read_text() for line in lines)
    with (tmp_path / "report.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(records)
    of = finding_report.values(records, "iris", "depth 2", "mean", "error")
    single = finding_report.values(records, "iris", "depth 2", "mixture", "error")
    assert (of < single).all()


def test_verdict_counts_the_nearest_rule():
    records = []
    for setting in finding_report.settings_of(SMALL):
        for seed in range(2):
            for i, contender in enumerate(finding_report.CONTENDERS):
                w1 = 0.0 if contender == "dominant" else 1.0 + i
                records.append({"data": "iris", "seed": seed, "setting": setting, "contender": contender})
                records[-1] |= {"w1_test": w1, "error": 9.0 if contender == "dominant" else 1.0}
    for line in finding_report.verdict(records, SMALL):
        assert "in 2 runs: dominant 2. " in line
        assert "apart) in 2. The mean with a gain is nearer than all of them in 0 (by norm) and 0" in line


def test_gain_by_norm():
    """The loss of predictions e for noise n is mean((g e - n)²), whatever the correlation of the two."""
    noise, prediction = np.random.default_rng(0).normal(size=(2, 100))
    prediction = 0.3 * prediction + 0.2 * noise

    class Model:
        def score(self, *_, gain, **__):
            return -np.mean((gain * prediction - noise) ** 2)

    found = finding.gain_by_norm(Model(), finding.split("iris", 0), 0)
    assert found == pytest.approx(np.sqrt(np.mean(noise**2) / np.mean(prediction**2)))


def test_halves_are_disjoint_and_keep_the_target():
    regression, classes = finding.split("diabetes", 0), finding.split("wine", 1)
    assert regression.train.shape == (221, 11)
    assert regression.labels is None
    assert len(classes.train) == len(classes.labels) == 89
    rows = {tuple(row) for row in classes.train}
    assert not any(tuple(row) in rows for row in classes.test)


def test_bad_input(tmp_path, capsys):
    for arguments, message in (
        (["mars"], "'mars' is no data set"),
        (["iris", "--seeds", "0"], "--seeds: '0', expected a whole number of at least 1"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["evaluate", "tabular", *arguments, "--out", str(tmp_path)])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="no data set of the finding"):
        finding.split("mars", 0)
