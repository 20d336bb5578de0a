"""A member of weight zero is not used: nothing of it reaches the output; a NaN of one that is used does."""

import itertools
import random

import numpy as np
import pytest
import torch
from torch import nn

import fastens
from fastens import rules, schedules
from fastens.ops.aggregate_update import aggregate_update
from fastens.reference.forest import Trees
from tests.networks import randomised
from tests.ops.cases import BACKENDS, DTYPES
from tests.ops.convolutions import conv2d_sum
from tests.tolerances import OP, relative_error

POISONS = (float("nan"), float("inf"), -float("inf"))
SCHEDULE = schedules.Discrete.linear()


def drawn(seed, most=10):
    """Weights with at least one zero, which sum to one, and the same by halves of a batch at two noise levels."""
    draw = random.Random(seed)
    weights = [0.0]
    while not any(weights):
        weights = [draw.choice((0.0, -0.0, 1.0, draw.uniform(0.2, 2.0))) for _ in range(draw.randint(2, most))]
        weights[draw.randrange(len(weights))] = 0.0
    return tuple(w / sum(weights) for w in weights)


def by_hand(scores, weights):
    return sum(w * x.double() for w, x in zip(weights, scores, strict=True) if w)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_backend(dtype, backend):
    update = "auto" if backend == "native" else backend  # which has no kernel for the CPU
    for seed in range(3 if backend == "triton" else 20):
        weights = drawn(seed)
        generator = torch.Generator().manual_seed(seed)
        scores = torch.randn(len(weights), 2, 3, 5, generator=generator, dtype=torch.float64).to(dtype)
        used = [k for k, w in enumerate(weights) if w]
        for k in set(range(len(weights))) - set(used):
            scores[k] = POISONS[(seed + k) % 3]
        for given in (scores, list(scores)):
            actual = fastens.aggregate(given, rules.Mean(weights), backend=backend)
            assert relative_error(actual, by_hand(scores, weights)) <= OP[dtype]
            for variance in (False, True):
                actual, spread = aggregate_update(given, rules.Mean(weights), variance=variance, backend=update)
                assert relative_error(actual, by_hand(scores, weights)) <= OP[dtype]
                assert spread is None or not spread.isfinite().any()
        scores[used[-1], 0, 0, 0] = torch.nan
        actual = fastens.aggregate(scores, rules.Mean(weights), backend=backend)
        assert int(actual.isnan().sum()) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend):
    weights = (0.25, 0.0, 0.75)
    scores = torch.randn(3, 2, 4)
    scores[1] = torch.inf
    scores.requires_grad_()
    fastens.aggregate(scores, rules.Mean(weights), backend=backend).sum().backward()
    assert torch.equal(scores.grad, torch.tensor(weights)[:, None, None].expand(3, 2, 4))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_sum_in_a_last_layer(backend):
    backend = "auto" if backend == "native" else backend
    x, weight = torch.randn(6, 4, 5, 5), torch.randn(3, 2, 4, 3, 3) / 6
    weight[1] = torch.nan
    parts = [torch.nn.functional.conv2d(x[2 * k : 2 * k + 2], weight[k], padding=1) for k in range(3)]
    actual = conv2d_sum(x, weight, None, [0.25, 0.0, 0.75], (1, 1), (1, 1), backend=backend)
    assert relative_error(actual, by_hand(parts, (0.25, 0.0, 0.75))) <= OP[torch.float32]


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x, t):
        return self.inner(x).tanh() + 0.1


@pytest.mark.parametrize("engine", ["fold", "loop"])
@pytest.mark.parametrize("differentiated", [False, True], ids=["planned", "folded"])
@pytest.mark.parametrize("poison", POISONS)
def test_ensembles(engine, differentiated, poison):
    members = [randomised(Network, seed) for seed in range(3)]
    with torch.no_grad():
        members[1].inner.bias.fill_(poison)
        members[1].inner.weight[0] = poison
    late, early = (0.25, 0.0, 0.75), (0.0, 0.0, 1.0)
    level = schedules.Discrete.linear().log_snr(SCHEDULE.time(torch.tensor([900, 100]))).tolist()
    rule = rules.NoiseDependentMean((late, early), tuple(level))
    x, t = torch.randn(4, 2, 4, 4), torch.tensor([950, 10, 900, 100])
    for value, times in itertools.product((rules.Mean(late), rule), (t, t[:1], torch.tensor(100), 900)):
        ensemble = fastens.Ensemble(members, value, engine=engine, schedule=SCHEDULE)
        if value is rule:
            rows = torch.as_tensor(times).reshape(-1).expand(4).tolist()
            weights = torch.tensor([early if row <= 100 else late for row in rows]).T[..., None, None, None]
        else:
            weights = torch.tensor(late)[:, None, None, None, None]
        for _ in range(3):
            with torch.set_grad_enabled(differentiated):
                found = ensemble(x, times)
            expected = sum(w * m(x, t).nan_to_num() for w, m in zip(weights, members, strict=True))
            assert relative_error(found.detach(), expected.detach()) < 1e-5
        if differentiated:
            found.square().sum().backward()
            used = dict(ensemble.named_parameters())["network.inner.weight"].grad[[0, 2]]
            assert used.isfinite().all()
            assert used[1].abs().sum() > 0


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_forests(backend):
    if backend == "native" and fastens.backends()["native"] != "available":
        pytest.skip("no compiled library")
    source = {"offsets": [0, 3, 4], "feature": [0, -1, -1, -1], "threshold": [0.5, 0, 0, 0], "left": [1, 0, 0, 0]}
    source |= {"right": [2, 0, 0, 0], "default_left": [0] * 4, "num_features": 1}
    x = np.array([[0.0], [1.0]])
    for poison in POISONS:
        forest = fastens.Forest(Trees(**source, values=[[1.0], [2.0], [poison]]))
        assert forest.predict(x, rules.Mean((1.0, 0.0)), backend=backend).tolist() == [[1.0], [2.0]]
        found = forest.predict_tensor(torch.from_numpy(x), rules.Mean((1.0, 0.0)), backend=backend)
        assert found.tolist() == [[1.0], [2.0]]
        assert not np.isfinite(forest.predict(x, rules.Mean((0.5, 0.5)), backend=backend)).any()
