"""Rules of users: from a function or a class they work wherever a rule does, by their definition."""

import copy
import dataclasses
import json
import pickle
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastens
from fastens import rules
from fastens.cli import main
from fastens.evaluation import Denoiser, denoising_loss
from fastens.ops.aggregate_update import aggregate_update
from fastens.reference.aggregate_update import aggregate_update as reference_update
from tests.networks import randomised, small_unet


@fastens.rule("trimmed_mean")
def trimmed(scores: Tensor, drop: int = 1) -> Tensor:
    """Mean of what is left without the smallest and largest."""
    return scores.sort(0).values[drop : len(scores) - drop].mean(0)


@dataclasses.dataclass(frozen=True)
class Powers(rules.Rule):
    """Power mean of magnitudes."""

    name: ClassVar[str] = "powers"
    exponent: float = 2.0
    levels: tuple[int, ...] = (1,)

    def combine(self, scores: Tensor) -> Tensor:
        return scores.abs().pow(self.exponent).mean(0).pow(1 / self.exponent)


@dataclasses.dataclass(frozen=True)
class Halved(rules.Mean):
    """A built-in rule with another definition."""

    name: ClassVar[str] = "halved"

    def combine(self, scores: Tensor) -> Tensor:
        return scores.mean(0) / 2


def expected_trimmed(scores, drop=1):
    ordered = np.sort(np.asarray(scores.detach().double()), 0)
    return torch.from_numpy(ordered[drop : len(scores) - drop].mean(0))


def expected_powers(scores, exponent):
    return scores.double().abs().pow(exponent).mean(0).pow(1 / exponent)


CASES = [
    ("trimmed_mean", lambda s: expected_trimmed(s)),
    (trimmed(drop=2), lambda s: expected_trimmed(s, 2)),
    (Powers(3.0), lambda s: expected_powers(s, 3.0)),
    ("powers", lambda s: expected_powers(s, 2.0)),
    (Halved(), lambda s: s.double().mean(0) / 2),
]
VALUES = [trimmed(), trimmed(2), Powers(), Powers(3.0, (1, 2)), Halved()]


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)).eval()


def name_of(value):
    """Of a case: the rule, and nothing for what it is held against, whose text has an address."""
    return "" if callable(value) and not isinstance(value, type) and not isinstance(value, rules.Rule) else str(value)


@pytest.mark.parametrize(("rule", "expected"), CASES, ids=name_of)
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_aggregate_runs_the_definition_with_its_parameters(rule, expected, backend, dtype):
    scores = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    for given in (scores, list(scores)):
        out = fastens.aggregate(given, rule, backend=backend)
        assert out.dtype == dtype
        torch.testing.assert_close(out, expected(scores).to(dtype))


@pytest.mark.parametrize(("rule", "expected"), CASES, ids=name_of)
@pytest.mark.parametrize("engine", ["fold", "loop"])
def test_an_ensemble_takes_it_and_says_so(rule, expected, engine):
    members = [network(k) for k in range(5)]
    ens = fastens.Ensemble(members, rule, engine=engine)
    x = torch.randn(6, 4)
    with torch.no_grad():
        stack = torch.stack([member(x) for member in members])
        for _ in range(2):
            torch.testing.assert_close(ens(x), expected(stack).float())
    assert f"rule {ens.rule}: by its definition" in str(ens.report())
    ens.rule = "median"
    assert "by its definition" not in str(ens.report())


@pytest.mark.parametrize("rule", [trimmed(), Powers(3.0)], ids=str)
def test_gradients_go_through_it(rule):
    scores = torch.randn(4, 2, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: fastens.aggregate(s, rule), scores)
    members = [network(k) for k in range(4)]
    ens, x = fastens.Ensemble(members, rule), torch.randn(2, 4, requires_grad=True)
    (ours,) = torch.autograd.grad(ens(x).sum(), x)
    (theirs,) = torch.autograd.grad(rule.combine(torch.stack([m(x) for m in members])).sum(), x)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("rule", ["trimmed_mean", Powers(3.0)], ids=str)
def test_compiles_whole(rule):
    scores = torch.randn(4, 2, 3)
    torch.compiler.reset()
    compiled = torch.compile(lambda s: fastens.aggregate(s, rule), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(scores), fastens.aggregate(scores, rule))


def test_guidance_and_a_step_follow_it():
    scores, g = list(torch.randn(5, 4, 3)), torch.tensor([2.0, 3.0])
    out, variance = aggregate_update(scores, trimmed(2), guidance=g, variance=True)
    expected = reference_update([s.double() for s in scores], trimmed(2), guidance=g.double(), variance=True)
    torch.testing.assert_close(out, expected[0].float())
    torch.testing.assert_close(variance, expected[1].float())


@pytest.mark.parametrize("rule", VALUES, ids=str)
def test_a_value_survives_every_form(rule):
    assert rules.from_dict(json.loads(json.dumps(rule.to_dict()))) == rule
    assert rules.from_schema(rule.name, rule.option, rule.values) == rule
    assert pickle.loads(pickle.dumps(rule)) == copy.deepcopy(rule) == rule
    assert hash(copy.deepcopy(rule)) == hash(rule)
    assert eval(repr(rule)) == rule
    assert [other for other in VALUES if other == rule] == [rule]


def test_an_ensemble_keeps_it_in_files(tmp_path):
    ens = fastens.Ensemble([randomised(small_unet, k) for k in range(3)], Powers(3.0, (1, 2)))
    ens.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["rule"] == {
        "rule": "powers",
        "exponent": 3.0,
        "levels": [1, 2],
    }
    assert fastens.Ensemble.from_pretrained(tmp_path).rule == Powers(3.0, (1, 2))
    assert pickle.loads(pickle.dumps(ens)).rule == ens.rule


@pytest.mark.parametrize(("rule", "expected"), [CASES[1], CASES[2]], ids=name_of)
def test_a_forest_takes_it(rule, expected):
    from sklearn.ensemble import RandomForestRegressor

    rows = np.random.default_rng(0).normal(size=(30, 3))
    forest = fastens.Forest.from_sklearn(RandomForestRegressor(6, max_depth=3, random_state=0).fit(rows, rows[:, :2]))
    wanted = expected(torch.from_numpy(forest.predict_members(rows)))
    for backend in ("auto", "reference"):
        np.testing.assert_allclose(forest.predict(rows, rule, backend=backend), wanted, rtol=1e-12)
        x = torch.from_numpy(rows)
        torch.testing.assert_close(forest.predict_tensor(x, rule, backend=backend), wanted)


def test_evaluation_measures_it():
    schedule = fastens.schedules.VP()
    ens = fastens.Ensemble([randomised(small_unet, k) for k in range(3)])
    denoiser = Denoiser(ens, schedule, prediction="epsilon")
    images = torch.rand(4, 1, 8, 8) * 2 - 1
    loss = denoising_loss(denoiser, images, rule_names=["trimmed_mean", "median", Powers(3.0)], times=2)
    # of three members the trimmed mean is the median
    np.testing.assert_allclose(loss.rules["trimmed_mean"], loss.rules["median"], rtol=1e-5)
    assert not np.allclose(loss.rules[str(Powers(3.0))], loss.rules["median"])


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package that offers a rule, one that is none, and one that cannot be imported."""
    (tmp_path / "rules_of_others.py").write_text(
        "import fastens\n\n@fastens.rule\n"
        "def largest_of_others(scores, add: float = 0.0):\n    return scores.amax(0) + add\n"
    )
    info = tmp_path / "rules_of_others-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rules-of-others\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[fastens.rules]\nlargest_of_others = rules_of_others:largest_of_others\n"
        "nothing_of_others = json:dumps\nbroken_of_others = no_module_of_others:rule\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


def test_a_package_offers_rules_by_entry_points(package, tmp_path):
    scores = torch.randn(3, 2, 4)
    torch.testing.assert_close(fastens.aggregate(scores, "largest_of_others"), scores.amax(0))
    assert rules.from_dict({"rule": "largest_of_others", "add": 1.0}).to_dict()["add"] == 1.0
    folder = tmp_path / "member"
    randomised(small_unet, 0).save_pretrained(folder)
    out = tmp_path / "out"
    main(["sample", str(folder), "--rule", "largest_of_others", "--num", "1", "--steps", "1", "--out", str(out)])
    assert json.loads((out / "samples.json").read_text())["rule"]["rule"] == "largest_of_others"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing_of_others", "rules-of-others offers as json:dumps, is none: no rule of that name"),
        ("broken_of_others", "cannot be loaded: ModuleNotFoundError: No module named 'no_module_of_others'"),
        ("largest_of_other", "did you mean 'largest_of_others'"),
    ],
)
def test_an_entry_point_that_is_none_is_named(name, message, package):
    with pytest.raises(ValueError, match=message):
        rules.get(name)


def test_a_definition_again_takes_the_place_of_the_one_before():
    for factor in (1.0, 2.0):

        @fastens.rule
        def rule_of_a_cell(scores, factor=factor):
            return factor * scores.sum(0)

        assert rules.get("rule_of_a_cell") == rule_of_a_cell()
        assert rules.get("rule_of_a_cell").to_dict()["factor"] == factor


def test_a_subclass_without_a_definition_keeps_its_parents_kernels():
    class LowerMedian(rules.Median):
        def __init__(self):
            super().__init__("lower")

    scores = torch.randn(4, 3, 5)
    for backend in ("auto", "native") if fastens.backends()["native"] == "available" else ("auto",):
        ours = fastens.aggregate(scores, LowerMedian(), backend=backend)
        assert torch.equal(ours, scores.sort(0).values[1])


def without_dimension(scores):
    return scores.mean()


def of_all(scores):
    return scores


def no_tensor(scores):
    return 1.0


def with_rest(scores, *rest):
    return scores.mean(0)


def without_default(scores, drop):
    return scores.mean(0)


def with_tensor(scores, weights=torch.ones(3)):  # noqa: B008
    return scores.mean(0)


def with_infinity(scores, least=float("-inf")):
    return scores.mean(0)


def with_attribute(scores, values=1):
    return scores.mean(0)


def without_scores(*, drop=1):
    return drop


class Nameless(rules.Rule):
    """Neither a name nor a definition."""


@dataclasses.dataclass(frozen=True)
class NoDefinition(rules.Rule):
    name: ClassVar[str] = "no_definition"


def define_without_a_name():
    class Other(rules.Median):
        def combine(self, scores):
            return scores[0]


SCORES = torch.zeros(3, 2, 4)
BAD = [
    (lambda: fastens.rule("mean")(of_all), ValueError, r"has the name of fastens\.rules\.mean\.Mean; choose another"),
    (lambda: fastens.rule("hinton")(of_all), ValueError, "has the name of"),
    (lambda: fastens.rule("powers")(of_all), ValueError, r"has the name of tests\.test_own_rules\.Powers"),
    (lambda: fastens.rule("a rule")(of_all), ValueError, "expected letters, digits and underscores"),
    (lambda: fastens.rule(3), TypeError, "the name is a int"),
    (lambda: fastens.rule("maximal")(torch.amax), TypeError, "expected a function of scores"),
    (lambda: fastens.rule(with_rest), TypeError, r"\*rest has no name to be kept under"),
    (lambda: fastens.rule(without_default), TypeError, "parameter drop has no default"),
    (lambda: fastens.rule(without_scores), TypeError, "first argument takes the scores"),
    (lambda: fastens.rule(with_tensor), TypeError, "`weights`: a Tensor has no form in JSON"),
    (lambda: fastens.rule(with_infinity), ValueError, "`least`: -inf has no form in JSON"),
    (lambda: fastens.rule(with_attribute), ValueError, "parameter values is an attribute of rules"),
    (lambda: trimmed(drop=SCORES), TypeError, "`drop`: a Tensor has no form in JSON"),
    (lambda: trimmed(keep=1), TypeError, "keep"),
    (
        lambda: rules.from_dict({"rule": "powers", "power": 1}),
        ValueError,
        "no parameter power; it has exponent, levels",
    ),
    (lambda: rules.get("powres"), ValueError, "did you mean 'powers'.*once the module that defines it is imported"),
    (lambda: rules.get(trimmed), TypeError, "call it to make a value"),
    (define_without_a_name, TypeError, "Other has a definition of its own; give it a name of its own"),
    (lambda: fastens.aggregate(SCORES, Nameless()), NotImplementedError, r"override combine\(scores\)"),
    (lambda: fastens.aggregate(SCORES, "no_definition"), NotImplementedError, r"override combine\(scores\)"),
    (
        lambda: fastens.aggregate(SCORES, fastens.rule(without_dimension)()),
        ValueError,
        r"makes \[\] of .* expected \[2",
    ),
    (lambda: fastens.aggregate(SCORES, fastens.rule(of_all)()), ValueError, r"makes \[3, 2, 4\] of scores \[3, 2, 4\]"),
    (lambda: fastens.aggregate(SCORES, fastens.rule(no_tensor)()), TypeError, "returns float"),
    (
        lambda: fastens.aggregate(SCORES, trimmed(), backend="native"),
        RuntimeError,
        "no native kernel knows rule trimmed",
    ),
    (lambda: fastens.aggregate(SCORES, trimmed(), weights=[1, 0, 0]), ValueError, "takes none or has its own"),
    (lambda: fastens.aggregate(SCORES, Halved(), weights=[1, 0, 0]), ValueError, "takes none or has its own"),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD, ids=[message for _, _, message in BAD])
def test_bad_rules_name_themselves(make, error, message):
    with pytest.raises(error, match=message):
        make()
