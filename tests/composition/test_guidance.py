"""Guidance of ensembles, held against loops over deep copies of the members in float64."""

import copy
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import fastens
from fastens import rules, schedules
from fastens.composition import Autoguided, Guided, compose
from fastens.evaluation import Denoiser
from fastens.samplers import Sampler
from tests.composition.networks import LABELS, NULL, NULLS, SCHEDULE, B, Network, T, Unconditional, made


@pytest.fixture
def x():
    return torch.randn(B, 2, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def combined(rule, outputs):
    return rules.get(rule).combine(torch.stack(outputs))


def by_hand(members, rule, order, scale, x, t, labels=LABELS, nulls=NULLS):
    """The plain loop, in which each branch is a call of its own. scale: a number, or [B]."""
    members = copy.deepcopy(members)
    scale = torch.as_tensor(scale, dtype=torch.float64).reshape(-1, 1, 1, 1)
    cond = [member(x, t, labels) for member in members]
    uncond = [member(x, t, nulls) for member in members]
    if order == "after":
        c, u = combined(rule, cond), combined(rule, uncond)
        return u + scale * (c - u)
    return combined(rule, [u + scale * (c - u) for c, u in zip(cond, uncond, strict=True)])


def close(found, expected, tolerance=1e-10):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


RULES = ["mean", "median", "dominant", "geometric", rules.Mean((0.7, 0.6, -0.3)), rules.Geometric("batch")]


@pytest.mark.covering(2)
@pytest.mark.parametrize("engine", ["fold", "loop"])
@pytest.mark.parametrize("order", ["after", "before"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_guided_is_the_loop(x, rule, order, engine):
    members = made()
    ensemble = fastens.Ensemble(members, rule, engine=engine)
    guided = compose(ensemble, Guided(3.0, unconditional={"class_labels": NULL}), order=order)
    expected = by_hand(members, rule, order, 3.0, x, T)
    close(guided(x, T, LABELS), expected)
    with torch.no_grad():
        for _ in range(6):
            close(guided(x, T, class_labels=LABELS), expected)
        next(iter(ensemble.parameters()))[1].mul_(1.7)
        next(members[1].parameters()).mul_(1.7)
        changed = by_hand(members, rule, order, 3.0, x, T)
        assert not torch.allclose(changed, expected)
        close(guided(x, T, LABELS), changed)


def test_the_orders_differ_for_a_median_and_not_for_a_mean(x):
    members = made()
    for rule, alike in (("mean", True), ("median", False)):
        after, before = (by_hand(members, rule, order, 3.0, x, T) for order in ("after", "before"))
        assert torch.allclose(after, before) == alike


def test_it_is_what_pipelines_make_of_two_blocks_of_rows(x):
    ensemble = fastens.Ensemble(made(), "median")
    uncond, cond = ensemble(torch.cat([x, x]), T.repeat(2), torch.cat([NULLS, LABELS])).chunk(2)
    guided = compose(ensemble, Guided(2.5, unconditional={"class_labels": NULL}))
    close(guided(x, T, LABELS), uncond + 2.5 * (cond - uncond))


def test_one_pass_of_all_rows(x):
    rows = []
    ensemble = fastens.Ensemble(made())
    guided = compose(ensemble, Guided(2.0, unconditional={"class_labels": NULL}))
    guided(x, T, LABELS)  # the first call asks a copy of a member whether it mixes rows
    original = ensemble._evaluated
    ensemble.__dict__["_evaluated"] = lambda args, kwargs: rows.append(len(args[0])) or original(args, kwargs)
    guided(x, T, LABELS)
    assert rows == [2 * B]


@pytest.mark.parametrize("value", [NULL, torch.tensor(NULL), torch.tensor([NULL]), NULLS], ids=repr)
@pytest.mark.parametrize("time", [0.3, torch.tensor(0.3), torch.tensor([0.3]), torch.full((B,), 0.3)], ids=repr)
def test_forms_of_conditions_and_times(x, value, time):
    members = made()
    guided = compose(
        fastens.Ensemble(members),
        Guided(2.0, conditional={"class_labels": LABELS}, unconditional={"class_labels": value}),
    )
    close(guided(x, time), by_hand(members, "mean", "after", 2.0, x, time), 1e-6)


def test_a_sequence_as_condition_keeps_its_own_rows(x):
    """A prompt's embedding [1, L, D] against one of each row, beside an argument without rows."""

    class Prompted(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.of_prompt = nn.Conv2d(2, 2, 1), nn.Linear(3, 2)

        def forward(self, x, t, prompt, shared=None):
            y = self.mix(x) + self.of_prompt(prompt).mean(1)[:, :, None, None].tanh()
            return y * (1 if shared is None else shared.sum())

    members = made(Prompted)
    prompts, empty = torch.randn(B, 7, 3, dtype=torch.float64), torch.zeros(1, 7, 3, dtype=torch.float64)
    guided = compose(fastens.Ensemble(members), Guided(2.0, unconditional={"prompt": empty}))
    calls = [[m(x, T, p) for m in copy.deepcopy(members)] for p in (prompts, empty.expand(B, 7, 3))]
    cond, uncond = (torch.stack(each).mean(0) for each in calls)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close(guided(x, T, prompts), uncond + 2 * (cond - uncond))
    shared = torch.rand(2, dtype=torch.float64)
    close(guided(x, T, prompts, shared=shared), (uncond + 2 * (cond - uncond)) * shared.sum())
    with pytest.raises(ValueError, match="together=False"):  # B numbers that are not of rows
        guided(x, T, prompts, shared=torch.rand(B, dtype=torch.float64))
    shared = torch.rand(B, dtype=torch.float64)
    apart = compose(fastens.Ensemble(members), Guided(2.0, unconditional={"prompt": empty}), together=False)
    close(apart(x, T, prompts, shared=shared), (uncond + 2 * (cond - uncond)) * shared.sum())


def test_scales_by_noise_level_and_interval(x):
    members = made()
    ensemble = fastens.Ensemble(members, schedule=SCHEDULE)
    null = {"class_labels": NULL}
    levels = SCHEDULE.log_snr(T)
    low, high = float(torch.exp(-levels[1] / 2)) * 0.9, float(torch.exp(-levels[1] / 2)) * 1.1
    inside = compose(ensemble, Guided(3.0, interval=(low, high), unconditional=null))
    close(inside(x, T, LABELS), by_hand(members, "mean", "after", [1.0, 3.0, 1.0], x, T))
    by_level = compose(ensemble, Guided([1.0, 5.0], log_snr=[float(levels[1]), float(levels[0])], unconditional=null))
    close(by_level(x, T, LABELS), by_hand(members, "mean", "after", [5.0, 1.0, 1.0], x, T))
    rows = []
    original = ensemble._evaluated
    ensemble.__dict__["_evaluated"] = lambda args, kwargs: rows.append(len(args[0])) or original(args, kwargs)
    close(inside(x, T[2:], LABELS), torch.stack([m(x, T[2:], LABELS) for m in members]).mean(0))
    assert rows == [B]  # outside the interval the condition alone


def test_outside_the_interval_a_branch_is_not_looked_at(x):
    members = made()
    with torch.no_grad():
        for member in members:
            member.label.weight[NULL] = torch.nan
    levels = SCHEDULE.log_snr(T)
    ensemble = fastens.Ensemble(members, schedule=SCHEDULE)
    guided = compose(
        ensemble,
        Guided(3.0, interval=(0, float(torch.exp(-levels[1] / 2))), unconditional={"class_labels": NULL}),
        together=False,
    )
    assert guided(x, T, LABELS).isnan().flatten(1).any(1).tolist() == [True, True, False]


def test_negative_prompts_add_up(x):
    members = made()
    terms = [Guided(s, unconditional={"class_labels": n}) for s, n in ((3.0, NULL), (1.5, 2))]
    main, first, second = (
        torch.stack([m(x, T, n) for m in copy.deepcopy(members)]).mean(0) for n in (LABELS, NULLS, torch.full((B,), 2))
    )
    close(compose(fastens.Ensemble(members), *terms)(x, T, LABELS), main + 2 * (main - first) + 0.5 * (main - second))


@pytest.mark.parametrize("order", ["after", "before"])
def test_variances_are_those_of_the_condition(x, order):
    members = made(lambda: Network(4))
    ensemble = fastens.Ensemble(members, "median", prediction=schedules.Prediction("epsilon", variances=True))
    guided = compose(ensemble, Guided(3.0, unconditional={"class_labels": NULL}), order=order)
    outputs = torch.stack([m(x, T, LABELS) for m in members])
    found = guided(x, T, LABELS)
    close(found[:, 2:], outputs[:, :, 2:].mean(0))

    class Half(nn.Module):
        def __init__(self, member):
            super().__init__()
            self.member = member

        def forward(self, *args):
            return self.member(*args)[:, :2]

    close(found[:, :2], by_hand([Half(m) for m in members], "median", order, 3.0, x, T))


@pytest.mark.parametrize("kind", ["epsilon", "v", "x0"])
@pytest.mark.parametrize("weak_kind", ["epsilon", "v", "x0"])
@pytest.mark.parametrize("order", ["after", "before"])
def test_autoguided_by_a_network_of_another_structure_and_parameterisation(x, kind, weak_kind, order):
    members, weak = made(), made(Unconditional, 2)
    ensemble = fastens.Ensemble(members, "dominant", prediction=kind, schedule=SCHEDULE)
    guide = fastens.Ensemble(weak, prediction=weak_kind, schedule=SCHEDULE)
    composed = compose(ensemble, Autoguided(2.0, weak=guide), order=order)
    alpha, sigma = (c.view(-1, 1, 1, 1) for c in (SCHEDULE.alpha(T), SCHEDULE.sigma(T)))

    def data(y, kind):
        return {"epsilon": (x - sigma * y) / alpha, "x0": y, "v": alpha * x - sigma * y}[kind]

    def back(d):
        epsilon = (x - alpha * d) / sigma
        return {"epsilon": epsilon, "x0": d, "v": alpha * epsilon - sigma * d}[kind]

    w = back(data(torch.stack([m(x, T) for m in weak]).mean(0), weak_kind))
    strong = [m(x, T, LABELS) for m in copy.deepcopy(members)]
    if order == "after":
        s = combined("dominant", strong)
        expected = w + 2 * (s - w)
    else:
        expected = combined("dominant", [w + 2 * (s - w) for s in strong])
    close(composed(x, T, LABELS), expected, 1e-9)


@pytest.mark.parametrize("order", ["after", "before"])
@pytest.mark.parametrize("rule", ["mean", "dominant"])
def test_guided_and_autoguided_by_one_module(x, rule, order):
    members, (weak,) = made(), made(Unconditional, 1)
    composed = compose(
        fastens.Ensemble(members, rule),
        Guided(3.0, unconditional={"class_labels": NULL}),
        Autoguided(1.5, weak=weak),
        order=order,
    )
    cond, uncond = ([m(x, T, labels) for m in copy.deepcopy(members)] for labels in (LABELS, NULLS))
    if order == "after":
        c, u = combined(rule, cond), combined(rule, uncond)
        expected = c + 2 * (c - u) + 0.5 * (c - weak(x, T))
    else:
        expected = combined(rule, [c + 2 * (c - u) + 0.5 * (c - weak(x, T)) for c, u in zip(cond, uncond, strict=True)])
    calls = []
    composed.weak[0].register_forward_hook(lambda *_: calls.append(1))
    close(composed(x, T, LABELS), expected)
    assert len(calls) == 1
    with torch.no_grad():
        for _ in range(3):
            composed(x, T, LABELS)
    assert composed.weak[0].engine == composed.ensemble.engine == "fold"


@pytest.mark.parametrize("rule", ["alternating", "mixture"])
def test_drawn_members_are_the_same_in_both_branches(x, rule):
    members = made()
    ensemble = fastens.Ensemble(members, rule)
    guided = compose(ensemble, Guided(3.0, unconditional={"class_labels": NULL}))
    with guided.trajectory(B, 3):
        found = guided(x, T, LABELS)
    every = [by_hand([m], "mean", "after", 3.0, x, T) for m in members]
    with ensemble.trajectory(B, 3):
        chosen = ensemble(x, T, LABELS)
    for i in range(B):
        k = next(k for k, m in enumerate(members) if torch.allclose(chosen[i], m(x, T, LABELS)[i]))
        close(found[i], every[k][i])


def test_assigned_rows_are_guided_by_their_member(x):
    members = made()
    ensemble = fastens.Ensemble(members)
    guided = compose(ensemble, Guided(3.0, unconditional={"class_labels": NULL}))
    with ensemble.assigned([2, 0, 1]):
        found = guided(x, T, LABELS)
    for i, k in enumerate((2, 0, 1)):
        close(found[i], by_hand([members[k]], "mean", "after", 3.0, x, T)[i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(x, dtype):
    members = [m.float() for m in made()]
    guided = compose(fastens.Ensemble(members), Guided(3.0, unconditional={"class_labels": NULL}))
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        found = guided(x.float(), T.float(), LABELS).double()
    expected = by_hand([m.double() for m in copy.deepcopy(members)], "mean", "after", 3.0, x, T)
    assert float(((found - expected).abs().max() / expected.abs().max()).detach()) < (
        1e-5 if dtype == torch.float32 else 5e-2
    )


def test_gradients(x):
    members = made()
    guided = compose(fastens.Ensemble(members), Guided(3.0, unconditional={"class_labels": NULL}))
    y, z = (x.clone().requires_grad_() for _ in "yz")
    guided(y, T, LABELS).square().sum().backward()
    by_hand(members, "mean", "after", 3.0, z, T).square().sum().backward()
    close(y.grad, z.grad, 1e-8)


@pytest.mark.parametrize("masks", ["fixed", "fresh"])
def test_masks_of_dropout_are_those_of_guided_rows(x, masks):
    class Dropping(Network):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.3)

        def forward(self, x, t, class_labels=None):
            return self.drop(super().forward(x, t, class_labels))

    ensemble = fastens.MCDropout(made(Dropping, 1)[0], 3, masks=masks)
    guided = compose(ensemble, Guided(3.0, unconditional={"class_labels": NULL}))
    with torch.no_grad(), ensemble.trajectory(B, 1):
        found = guided(x, T, LABELS)
    with torch.no_grad(), ensemble.trajectory(B, 1):
        uncond, cond = ensemble(torch.cat([x, x]), T.repeat(2), torch.cat([NULLS, LABELS])).chunk(2)
    close(found, uncond + 3 * (cond - uncond))


def test_threads_and_compilers(x):
    guided = compose(fastens.Ensemble(made()), Guided(3.0, unconditional={"class_labels": NULL}))
    with torch.no_grad():
        expected = guided(x, T, LABELS)
        close(torch.compile(guided, backend="aot_eager")(x, T, LABELS), expected)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: guided(x, T, LABELS).detach(), range(20)):
            close(found, expected)


def test_members_that_remember_are_not_asked_more_than_they_are_called(x):
    class Counting(Network):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

        def forward(self, x, t, class_labels=None):
            self.calls += 1
            return super().forward(x, t, class_labels) + self.calls

    ensemble = fastens.Ensemble(made(Counting))
    guided = compose(ensemble, Guided(2.0, unconditional={"class_labels": NULL}))
    with torch.no_grad():
        guided(x, T, LABELS)
        guided(x, T, LABELS)
    assert float(ensemble.members[1].calls) == 2


@pytest.mark.parametrize("method", ["ddim", "heun"])
def test_samplers_take_it(method):
    members = made()

    class ByHand(nn.Module):
        def __init__(self):
            super().__init__()
            self.members = nn.ModuleList(copy.deepcopy(members))

        def forward(self, x, t):
            return by_hand(list(self.members), "median", "before", 3.0, x, t)

    guided = compose(
        fastens.Ensemble(members, "median", prediction="v", schedule=SCHEDULE),
        Guided(3.0, conditional={"class_labels": LABELS}, unconditional={"class_labels": NULL}),
        order="before",
    )
    found = Sampler(Denoiser(guided), method, steps=4)(B, (2, 5, 5), 1)
    expected = Sampler(Denoiser(ByHand(), SCHEDULE, "v"), method, steps=4)(B, (2, 5, 5), 1)
    close(found, expected, 1e-5)


def test_branches_that_cannot_stand_side_by_side_warn_and_are_evaluated_apart(x):
    members = made()

    def forward(self, x, t, class_labels=None, scale=1.0):
        return Network.forward(self, x, t, class_labels, 1.0 if scale is None else scale)

    for member in members:
        member.__class__ = type("Scaled", (Network,), {"forward": forward})
    guided = compose(fastens.Ensemble(members), Guided(2.0, unconditional={"scale": None, "class_labels": NULL}))
    with pytest.warns(UserWarning, match="branches are evaluated one after the other"):
        close(guided(x, T, LABELS, scale=1.0), by_hand(members, "mean", "after", 2.0, x, T))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guided(x, T, LABELS, scale=1.0)
