"""Rules are values: comparable, hashable, printable, JSON-able."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch

from fastens import rules

VALUES = [
    rules.Mean(),
    rules.Mean((0.25, 0.75)),
    rules.NoiseDependentMean(((0.25, 0.75), (1.5, -0.5)), (-3.0, 2.0)),
    rules.Sum(),
    rules.Median(),
    rules.Median("lower"),
    rules.Geometric(),
    rules.Geometric("batch", 1e-3),
    rules.Dominant(),
    rules.MaxAbs(),
    rules.Alternating(),
    rules.Mixture(),
]


@pytest.mark.parametrize("rule", VALUES, ids=str)
def test_a_rule_survives_every_form(rule):
    assert rules.from_dict(json.loads(json.dumps(rule.to_dict()))) == rule
    assert pickle.loads(pickle.dumps(rule)) == rule
    assert copy.deepcopy(rule) == rule
    assert hash(copy.deepcopy(rule)) == hash(rule)
    assert rule.needs_noise_level or rules.from_schema(rule.name, rule.option, rule.values) == rule
    assert eval(repr(rule), vars(rules)) == rule
    assert [other for other in VALUES if other == rule] == [rule]


@pytest.mark.parametrize("alias", rules.ALIASES)
def test_aliases(alias):
    assert rules.get(alias) == rules.get(rules.ALIASES[alias])


def test_names_and_randomness():
    assert rules.names() == ("mean", "sum", "median", "geometric", "dominant", "max_abs", "alternating", "mixture")
    assert [name for name in rules.names() if rules.get(name).random] == ["alternating", "mixture"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rules.get("geometrical"), "did you mean 'geometric'"),
        (lambda: rules.get("arithmetc"), "did you mean 'arithmetic'"),
        (lambda: rules.get("zzz"), "The rules are mean, sum"),
        (lambda: rules.Median("upper"), "expected 'average' or 'lower'"),
        (lambda: rules.Geometric("pixel"), "expected 'sample' or 'batch'"),
        (lambda: rules.Geometric(eps=0.0), "at least 1e-30"),
        (lambda: rules.Mean(()), "got none"),
        (lambda: rules.Mean((0.5, 0.4)), "sum of 1"),
        (lambda: rules.NoiseDependentMean(), "one tuple of K weights per level"),
        (lambda: rules.NoiseDependentMean(((1.0,), (0.5, 0.5)), (0.0, 1.0)), "one tuple of K weights per level"),
        (lambda: rules.NoiseDependentMean(((1.0,),), (0.0, 1.0)), "for 2 levels"),
        (lambda: rules.NoiseDependentMean(((1.0,), (1.0,)), (1.0, 1.0)), "rising"),
        (lambda: rules.NoiseDependentMean(((0.5, 0.6),), (1.0,)), "sum of 1"),
        (lambda: rules.get("noise_dependent_mean"), "fit_weights"),
        (lambda: rules.from_dict({"weights": [1.0]}), "under 'rule'"),
        (lambda: rules.from_dict({"rule": "median", "odd": 1}), "has no parameter odd; it has even"),
    ],
)
def test_bad_values_name_themselves(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("make", [np.array, torch.tensor, list])
def test_numbers_of_arrays_are_kept_as_floats(make):
    rows, levels = [[1.0, 0.0], [0.25, 0.75]], [-1.0, 2.0]
    for rule in (
        rules.Mean(make(rows[1])),
        rules.Product(make(rows[0])),
        rules.Product(make(rows), make(levels)),
        rules.NoiseDependentMean(make(rows), make(levels)),
        rules.Geometric(eps=np.float32(0.5)),
        rules.Geometric(eps=torch.tensor(0.5)),
    ):
        assert rules.from_dict(json.loads(json.dumps(rule.to_dict()))) == rule


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rules.Geometric(eps="small"), "`eps`: expected a number, got 'small'"),
        (
            lambda: rules.NoiseDependentMean([[1.0]], ["low"]),
            "`log_snr`: expected one number per level",
        ),
        (lambda: rules.Product([1.0], ["low"]), "expected one number per member"),
    ],
)
def test_what_is_no_number_names_itself(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_weights_fit_the_members():
    rules.Mean((0.5, 0.5)).check(2)
    with pytest.raises(ValueError, match="one weight per member, 3, got 2"):
        rules.Mean((0.5, 0.5)).check(3)


def test_weights_between_noise_levels():
    rule = rules.NoiseDependentMean(((1.0, 0.0), (0.0, 1.0)), (-2.0, 2.0))
    assert rule.at(1.0) == rules.Mean((0.25, 0.75))
    assert (rule.at(-9.0), rule.at(9.0)) == (rules.Mean((1.0, 0.0)), rules.Mean((0.0, 1.0)))
    assert rules.NoiseDependentMean(((0.5, 0.5),), (0.0,)).at(3.0) == rules.Mean((0.5, 0.5))
