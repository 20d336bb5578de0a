"""The state of each signature that was called, as ``report()`` has it: its name, and the reason."""

import random

import pytest
import torch
from torch import nn

import fastens
from fastens.ops.run_program import available
from tests.networks import mlp, randomised

needs_plans = pytest.mark.skipif(not available(), reason="no compiled library")


class Of(nn.Module):
    """A network that does something in front of another."""

    def __init__(self, seed, before=lambda x: x):
        super().__init__()
        self.net, self.before = randomised(mlp, seed), before

    def forward(self, x):
        return self.net(self.before(x))


def reads(x):
    return -x if float(x.sum()) > 0 else x


def draws(x):
    return x + torch.randn_like(x)


def mixes(x):
    return x - x.mean(0)


def ensemble(before=None, **options):
    members = [randomised(mlp, k) if before is None else Of(k, before) for k in range(3)]
    return fastens.Ensemble(members, **options).eval()


def states(ens):
    return {call.call: (call.state, call.why) for call in ens.report().calls}


def test_a_signature_that_was_not_called_has_no_state():
    assert ensemble().report().calls == []


@needs_plans
@torch.no_grad()
def test_planned():
    ens = ensemble()
    ens(torch.ones(4, 5))
    assert states(ens) == {"float32[4, 5]": ("planned", "")}
    assert "call of float32[4, 5]: planned\n" in str(ens.report())


def test_folded_says_why_there_is_no_plan():
    ens = ensemble()
    ens(torch.ones(4, 5))
    state, why = states(ens)["float32[4, 5]"]
    assert (state, why.partition(";")[0]) == ("folded", "gradients are enabled and asked for")
    assert "call of float32[4, 5]: folded, gradients are enabled" in str(ens.report())


@needs_plans
@pytest.mark.parametrize(("before", "state", "why"), [(reads, "refused", "reads values"), (draws, "folded", "random")])
@torch.no_grad()
def test_without_a_plan_the_reason_is_that_of_the_signature(before, state, why):
    ens = ensemble(before)
    ens(torch.ones(4, 5))
    with torch.enable_grad():  # another reason, of another signature
        ens(torch.ones(2, 5))
    found = states(ens)["float32[4, 5]"]
    assert found[0] == state
    assert why in found[1]


@torch.no_grad()
def test_looped_where_rows_are_mixed_and_one_member_answers_each():
    ens = ensemble(mixes, rule="alternating")
    ens(torch.randn(4, 5))
    (call,) = ens.report().calls
    assert (call.call, call.state) == ("one member a row: float32[4, 5]", "looped")
    assert "mix the rows" in call.why


@torch.no_grad()
def test_looped_as_a_whole_has_no_states_of_signatures():
    ens = ensemble(engine="loop")
    ens(torch.ones(4, 5))
    assert ens.report().calls == []
    assert ens.report().engine == "loop"
    assert "no plan yet" not in str(ens.report())


@needs_plans
@torch.no_grad()
def test_a_state_is_forgotten_with_what_it_rests_on():
    ens = ensemble()
    ens(torch.ones(4, 5))
    ens.refresh()
    assert ens.report().calls == []
    ens(torch.ones(4, 5))
    assert states(ens) == {"float32[4, 5]": ("planned", "")}


@needs_plans
@torch.no_grad()
def test_more_signatures_than_there_may_be_plans():
    ens = ensemble()
    for batch in range(1, 21):
        ens(torch.ones(batch, 5))
    found = states(ens)
    assert [state for state, _ in found.values()] == ["planned"] * 16
    assert list(found)[-1] == "float32[20, 5]"
    assert len(ens.report().plans) == 16


@needs_plans
@pytest.mark.parametrize("seed", range(8))
def test_states_are_what_calls_do(seed):
    """Any order of calls: no signature is planned that has no plan, and each that is not says why."""
    rng = random.Random(seed)
    ens = ensemble(rng.choice([None, reads, draws, mixes]))
    for _ in range(12):
        x = torch.randn(rng.randint(1, 3), 5)
        with torch.set_grad_enabled(rng.random() < 0.3):
            rng.choice([ens, ens.member_outputs, ens.with_rule("alternating"), ens.with_rule("median")])(x)
        if rng.random() < 0.1:
            ens.refresh()
    report = ens.report()
    assert sum(call.state == "planned" for call in report.calls) == len(report.plans)
    assert len({call.call for call in report.calls}) == len(report.calls)
    for call in report.calls:
        assert call.state in ("folded", "looped", "planned", "refused"), call
        assert (call.state == "planned") == (not call.why), call
