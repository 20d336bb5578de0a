"""C1: aggregation of K = 5 scores of 3.1 M elements against what people write today."""

import pytest
import torch

import fastens
from bench.contest import contest

K, SHAPE = 5, (16, 3, 256, 256)


def dominant(scores):
    stack = torch.stack(scores)
    return stack.gather(0, stack.abs().argmax(0, keepdim=True)).squeeze(0)


def geometric(scores):
    stack = torch.stack(scores)
    lowest = stack.amin((0, 2, 3, 4), keepdim=True)  # negative here
    return ((stack - lowest + 1e-6).log().mean(0).exp() - 1e-6) + lowest[0]


NAIVE = {
    "mean": ({"stack + mean": lambda scores: torch.stack(scores).mean(0)}, 3),
    "sum": ({"stack + sum": lambda scores: torch.stack(scores).sum(0)}, 3),
    "median": ({"torch.median": lambda scores: torch.stack(scores).median(0).values}, 120),
    "dominant": ({"abs + argmax + gather": dominant}, 200),
    "geometric": ({"stack + log + mean + exp": geometric}, 8),
    "max_abs": ({"abs + amax": lambda scores: torch.stack(scores).abs().amax(0)}, 3),
}


@pytest.mark.parametrize("rule", NAIVE)
def test_aggregate(benchmark, rule):
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randn(SHAPE, generator=generator) for _ in range(K)]
    naive, wanted = NAIVE[rule]
    out = torch.empty(SHAPE)

    def move_the_bytes():  # read K members, write one result: no rule can be faster than memory
        for score in scores:
            score.sum()
        out.zero_()

    with torch.inference_mode():
        contest(
            benchmark,
            lambda: fastens.aggregate(scores, rule),
            {name: lambda run=run: run(scores) for name, run in naive.items()},
            fastens.aggregate([score.double() for score in scores], rule, backend="reference"),
            1e-4,
            "C1",
            f"aggregate {rule}",
            f"K={K}, {SHAPE} float32",
            {name: wanted for name in naive},
            rounds=8,
            floor=move_the_bytes,
        )
