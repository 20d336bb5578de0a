"""What is kept is found again by all that it was computed from, and by nothing else."""

import copy
import functools
import re
from collections import deque
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import fastens
from fastens import schedules
from fastens.composition import Guided, compose
from fastens.evaluation import Denoiser, likelihood, sample
from fastens.evaluation.classes import class_log_likelihoods
from fastens.evaluation.identity import fingerprint
from fastens.schemes import ScoreNoise


class Network(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.layer, self.embed, self.gain = nn.Linear(3, 3), nn.Embedding(4, 3), 1.0
        self.register_buffer("scale", torch.ones(()), persistent=False)

    def forward(self, x, t, label=None):
        h = self.layer(x).tanh() * self.scale
        return self.gain * (h if label is None else h + self.embed(label)) + 0.01 * t.reshape(-1, 1).to(x.dtype)


def made(rule="mean", **options):
    return fastens.Ensemble([Network(seed) for seed in range(2)], rule, **options).eval()


def of_class(label):
    return {"conditional": {"label": torch.tensor([1])}, "unconditional": {"label": torch.tensor([label])}}


def changed(name, value):
    def change(model):
        setattr(model, name, value)
        return model

    return change


DENOISERS = {
    "another class": (lambda c=c: (made(), {"label": torch.tensor([c])}) for c in (0, 1)),
    "another scale of guidance": (lambda s=s: (compose(made(), Guided(s, **of_class(0))), {}) for s in (2.0, 6.0)),
    "another condition left out": (lambda c=c: (compose(made(), Guided(2.0, **of_class(c))), {}) for c in (0, 2)),
    "another order": (
        lambda o=o: (compose(made("median"), Guided(2.0, **of_class(0)), order=o), {}) for o in ("after", "before")
    ),
    "another rule inside": (lambda r=r: (compose(made(r), Guided(2.0, **of_class(0))), {}) for r in ("mean", "sum")),
    "an attribute": (lambda g=g: (changed("gain", g)(made()), {}) for g in (1.0, 3.0)),
    "an attribute of modules": (lambda g=g: (changed("gain", g)(Network()), {}) for g in (1.0, 3.0)),
    "noise on the score": (lambda s=s: (ScoreNoise(made(), s), {}) for s in (0.1, 0.9)),
    "a buffer that is not saved": (lambda s=s: (changed("scale", torch.tensor(s))(Network()), {}) for s in (1.0, 0.2)),
}
DENOISERS = {name: tuple(pair) for name, pair in DENOISERS.items()}


@pytest.mark.parametrize("name", DENOISERS)
def test_what_was_kept_of_another_is_not_taken(name, tmp_path):
    models = [make() for make in DENOISERS[name]]
    one, other = (Denoiser(model, schedules.VP(), "epsilon", conditioning) for model, conditioning in models)
    first, second = (sample(each, 3, (3,), steps=3, cache=tmp_path) for each in (one, other))
    assert torch.equal(second, sample(other, 3, (3,), steps=3))
    assert not torch.equal(first, second)
    assert len(list(tmp_path.iterdir())) == 2
    same = Denoiser(DENOISERS[name][0]()[0], schedules.VP(), "epsilon", models[0][1])
    again = sample(same, 3, (3,), steps=3, cache=tmp_path)
    assert torch.equal(again, first)
    assert len(list(tmp_path.iterdir())) == 2  # the same in other objects


def test_likelihoods_under_classes_are_each_their_own(tmp_path):
    data = torch.rand(2, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    denoiser = Denoiser(made(), schedules.VP(), "epsilon")
    options = {"argument": "label", "by": "likelihood", "method": "euler", "steps": 2}
    kept, expected = (class_log_likelihoods(denoiser, data, [0, 1, 2], cache=c, **options) for c in (tmp_path, None))
    np.testing.assert_array_equal(kept.values, expected.values)
    assert len(np.unique(kept.values)) == 6


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


def test_calls_change_nothing_and_speed_is_not_part_of_it(tmp_path):
    model = made()
    before = fingerprint(model=model)
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(2, 3), torch.zeros(2))
    assert fingerprint(model=model) == before == fingerprint(model=made(max_fold=1, backend="reference"))
    assert fingerprint(model=copy.deepcopy(model)) == before
    assert fingerprint(model=model.with_rule("median")) != before
    likelihood(Denoiser(model, schedules.VP(), "epsilon"), torch.zeros(1, 3), method="euler", steps=1)  # keeps nothing


def of_inner(factor):
    return eval(f"lambda x: (lambda y: y * {factor})(x)")  # one name and place for both


@pytest.mark.parametrize("pair", [
    (torch.zeros(2), torch.zeros(2, dtype=torch.int32)), (torch.zeros(2, 3), torch.zeros(3, 2)), ([1, 2], [12]),
    ({"a": 1}, {"a": 2}), (1, True), ("1", 1), (np.zeros(2), np.zeros(2, np.float32)),
    (lambda x: x + 1, lambda x: x + 2), (fastens.rules.Geometric(), fastens.rules.Geometric("batch")),
    (schedules.VP(), schedules.SubVP()), (SimpleNamespace(a=1), SimpleNamespace(a=2)), (slice(1), slice(2)),
    (np.float64(1), np.float64(2)), (Slotted(1), Slotted(2)), (deque([1]), deque([2])),
    (re.compile("a"), re.compile("b")),
    ({"a": {}, "b": 1}, {"a": {"b": 1}}), ([{"a": 1}, {}], [{}, {"a": 1}]), (of_inner(2), of_inner(3)),
    (fastens.PerMember([0.0, 1.0]), fastens.PerMember([1.0, 1.0])),
    (np, torch), (Fraction(1, 2), Fraction(1, 3)), (functools.partial(max, 1), functools.partial(max, 2)),
])  # fmt: skip
def test_values_differ(pair):
    one, other = pair
    assert fingerprint(x=one) != fingerprint(x=other)
    same = one if one is np else copy.deepcopy(one)
    assert fingerprint(x=one) == fingerprint(x=same)


LIMITS, SCALE = [1.0], torch.ones(2)


def scaled(x):
    return x * SCALE


def limited(x):
    return torch.clamp(scaled(x), max=LIMITS[0])


@pytest.mark.parametrize(("name", "value"), [("LIMITS", [2.0]), ("SCALE", torch.zeros(2)), ("scaled", lambda x: x)])
def test_a_function_is_what_it_names_in_its_module(name, value, monkeypatch):
    before = fingerprint(scorer=limited)
    assert fingerprint(scorer=limited) == before
    monkeypatch.setitem(globals(), name, value)
    assert fingerprint(scorer=limited) != before


def test_a_function_that_calls_itself_has_a_fingerprint():
    def depth(x):
        return depth(x[0]) if isinstance(x, list) else limited(x)

    assert fingerprint(scorer=depth) == fingerprint(scorer=depth)
