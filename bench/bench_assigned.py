"""P3: rows that have members, in one planned pass, beside the loop over members and the mean's pass of as many rows."""

import pytest
import torch
from torch import Tensor

import fastens
from bench.bench_forward import K, digits_members
from bench.contest import contest
from fastens.demo.train import MODEL

LOOP, MEAN = "loop over members", "the mean of as many rows"


@pytest.mark.parametrize(("rows", "faster"), {1: 5, 2: None, 3: None, 4: 3.5, 6: None, 8: None, 16: 2}.items())
def test_assigned_rows(benchmark, rows, faster):
    members = digits_members()
    size = MODEL["sample_size"]
    x = torch.randn(K * rows, 1, size, size, generator=torch.Generator().manual_seed(0))
    t = torch.full((K * rows,), 500)
    ens = fastens.Ensemble(members)

    def assigned() -> Tensor:
        with ens.assigned(per_member=rows):
            return ens(x, t).sample

    def looped() -> Tensor:
        return torch.cat([m(x[k * rows : (k + 1) * rows], t[:rows]).sample for k, m in enumerate(members)])

    def mean() -> Tensor:
        ens(x[:rows], t[:rows])
        return expected  # its own result was just checked

    with torch.no_grad():
        expected = looped()
        average = torch.stack([m(x[:rows], t[:rows]).sample for m in members]).mean(0)
        assert (ens(x[:rows], t[:rows]).sample - average).abs().max() <= 1e-4 * average.abs().max()
        contest(
            benchmark,
            assigned,
            {LOOP: looped, MEAN: mean},
            expected,
            1e-4,
            "P3",
            f"{rows} rows of each member in one pass",
            f"K={K}, {rows} rows a member, {size}x{size}, float32",
            {MEAN: 1 / 1.15} | ({LOOP: faster} if faster else {}),
            rounds=31,
            in_succession=2,
        )
    assert ens.report().plans
