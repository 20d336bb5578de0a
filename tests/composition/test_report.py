"""The report on compositions: its truth is the truth, its command writes it, and the one that ships keeps its word."""

import csv
import math
from pathlib import Path

import pytest
import torch

from fastens.composition.report import WANTED, write_report
from fastens.composition.study import CASES, SCHEDULE, WAYS, Mixture, Truth
from fastens.composition.superpose import superpose
from tests.evaluation.densities import MixtureNetwork

SHIPPED = Path(__file__).resolve().parents[2] / "docs/evaluation/composition"


def test_the_studys_network_is_the_mixtures():
    means = torch.randn(3, 4, dtype=torch.float64)
    ours, theirs = Mixture(SCHEDULE, means, 0.7), MixtureNetwork(SCHEDULE, means, 0.7)
    x, t = torch.randn(5, 4, dtype=torch.float64), torch.full((5,), 0.3, dtype=torch.float64)
    torch.testing.assert_close(ours(x, t), theirs(x, t))
    torch.testing.assert_close(ours.log_density(x), theirs.log_density(x, torch.tensor(SCHEDULE.t_data)).detach())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_truth_is_the_product_of_the_members_densities(case):
    """Ratios of densities, by counting exact samples around points of the first two axes."""
    members = case.members(2)
    drawn = case.exact(400_000, 2, torch.Generator().manual_seed(0))
    points, radius = drawn[:12], 0.12
    counts = ((drawn[None] - points[:, None]).square().sum(-1) < radius**2).sum(1).double()
    logs = sum(w * member.log_density(points) for w, member in zip(case.weights, members, strict=True))
    dense = counts > 400
    assert int(dense.sum()) >= 5
    found, expected = counts[dense].log(), logs[dense]
    assert float(((found - found.mean()) - (expected - expected.mean())).abs().max()) < 0.2


@pytest.mark.parametrize("case", [CASES[0], CASES[3]], ids=lambda case: case.name)
def test_at_most_a_fifth_of_the_error_is_left(case):
    truth, denoiser = Truth(case, 2), case.denoiser(2)
    floor = truth.floor(3000)
    naive, both = (
        truth.divergence(superpose(denoiser, 3000, (2,), steps=100, **WAYS[way]).samples) - floor
        for way in ("naive", "both")
    )
    assert both <= WANTED * naive


def test_the_command_writes_a_report(tmp_path):
    results = write_report(tmp_path, num=200, steps=6, sizes=(2,), progress=False)
    assert len(results) == len(CASES) * len(WAYS)
    assert {path.name for path in tmp_path.iterdir()} == {"report.csv", "report.json", "report.md", "report.png"}
    assert "## Log-densities along the way" in (tmp_path / "report.md").read_text()


def test_the_report_that_ships_keeps_its_word():
    rows = list(csv.DictReader((SHIPPED / "report.csv").open()))
    errors = {(row["case"], row["dimensions"], row["way"]): float(row["error"]) for row in rows}
    cases = {(case, size) for case, size, _ in errors}
    assert cases == {(case.name, size) for case in CASES for size in ("2", "8", "32")}
    for case, size in cases:
        assert errors[case, size, "both"] <= WANTED * errors[case, size, "naive"]
        assert not math.isnan(errors[case, size, "both"])
