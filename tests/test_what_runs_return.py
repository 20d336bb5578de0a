"""What one run of all members returns, and what it draws, is what the members' own runs do."""

import contextlib

import pytest
import torch
from torch.nn import functional as F

import fastens
from tests.whole_runs import K, N, Which, alone, together


@pytest.fixture(params=["fold", "loop"])
def which(request):
    return fastens.Ensemble([Which(k) for k in range(K)], engine=request.param)


@pytest.mark.parametrize("apart", [False, True], ids=["together", "apart"])
def test_values_beside_samples(which, apart):
    """What is the same for all is returned once, whether runs are made together or one after the other."""

    def sample(num, long=1.0):
        x = which(torch.zeros(num, 3))
        if apart:
            float(x[0, 0])
        return {"x": x, "steps": 4, "name": "a", "nan": float("nan")}

    with pytest.warns(UserWarning, match="one after the other") if apart else contextlib.nullcontext():
        found = fastens.sample_members(sample, None, N, ensemble=which)
    assert found["x"].shape == (K, N, 3)
    assert (found["steps"], found["name"], str(found["nan"])) == (4, "a", "nan")


@pytest.mark.parametrize("more", [lambda x: [x] * (1 + int(x[0, 0])), lambda x: x.repeat(1 + int(x[0, 0]), 1)])
def test_runs_of_other_shapes_are_named(which, more):
    def sample(num):
        return more(which(torch.zeros(num, 3)))

    with (
        pytest.warns(UserWarning, match="one after the other"),
        pytest.raises(ValueError, match="the members' runs return what cannot be stacked"),
    ):
        fastens.sample_members(sample, None, N, ensemble=which)


@pytest.mark.parametrize("of", ["x", "ensemble"])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    "drop", [F.dropout, F.dropout1d, F.alpha_dropout, F.feature_alpha_dropout], ids=lambda f: f.__name__
)
def test_what_the_sampler_drops_is_shared(which, drop, inplace, of):
    def sample(model):
        def run(num):
            x = torch.randn(num, 4, 3)
            value = (x if of == "x" else model(x)).clone()
            return model(drop(value, training=True, inplace=inplace)) + torch.randn(num, 4, 3)

        return run

    torch.testing.assert_close(together(sample, which), alone(lambda k: sample(Which(k)), range(K)))
