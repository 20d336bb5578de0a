"""P7: what deterministic mode costs: the same evaluations as in the fast mode, whose bits depend on the batch."""

import pytest
import torch
from torch import Tensor

import fastens
from bench.bench_forward import NETWORKS, TOLERANCES, K
from bench.contest import contest

FAST = "fast mode"


@pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("goal", ["C2", "C3"])
def test_deterministic(benchmark, goal, batch, dtype):
    network = NETWORKS[goal]
    members = [member.to(dtype) for member in network.members(K)]
    shape = (batch, network.channels, network.size, network.size)
    x, t = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype), torch.full((batch,), 500)
    fast, exact = fastens.Ensemble(members), fastens.Ensemble(members)

    def deterministic() -> Tensor:
        with fastens.deterministic():
            return exact(x, t).sample

    name = str(dtype).removeprefix("torch.")
    with torch.no_grad():
        expected = torch.stack([member.float()(x.float(), t).sample.double() for member in members]).mean(0)
        contest(
            benchmark,
            deterministic,
            {FAST: lambda: fast(x, t).sample},
            expected,
            TOLERANCES[dtype],
            "P7",
            f"deterministic mode of {goal} in {name}, K = {K}, batch {batch}",
            f"K={K}, B={batch}, {network.size}x{network.size}, {name}",
            {FAST: 1 / 1.10},
            rounds=network.rounds[batch],
        )
