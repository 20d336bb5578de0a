"""What a first call does not show: mixing behind the rounding of half precision, or before a layer of zeros."""

import warnings

import pytest
import torch
from torch import nn

import fastens
from fastens import _native
from fastens.engine import structure
from fastens.engine.check import TOLERANCE, relative_error
from fastens.engine.entry import Entry
from fastens.fold.dispatch import RULES
from tests.fold.contract import Held, averaged, batch, made, near

HALVES = [torch.bfloat16, torch.float16]


class Network(nn.Module):
    """A perceptron whose activation is softsign, for which tests plant a rule that is wrong."""

    def __init__(self, zero=False, context=False):
        super().__init__()
        self.first, self.second, self.out = nn.Linear(4, 32), nn.Linear(32, 32), nn.Linear(32, 4)
        self.zero, self.context = zero, nn.Linear(4, 32) if context else None

    def forward(self, x, context=None):
        h = torch.tanh(self.first(x))
        if self.context is not None:
            h = h + nn.functional.softsign(self.context(context))
        else:
            h = h + nn.functional.softsign(self.second(h))
        return self.out(h)


def zeroed(k):
    network = Network()
    nn.init.zeros_(network.out.weight)
    nn.init.zeros_(network.out.bias)
    return network


@pytest.fixture
def planted(monkeypatch):
    """A rule for softsign that mixes rows by a share of their mean."""

    def plant(share):
        def wrong(fold, func, input):
            stack = fold.stack(input)
            stack = stack / (1 + stack.abs())
            return fold.wrap(stack + share * stack.mean(1, keepdim=True).roll(1, 0))

        monkeypatch.setitem(RULES, nn.functional.softsign, wrong)

    return plant


def halves(make, dtype, **options):
    members = [made(make, k).to(dtype) for k in range(3)]
    return members, fastens.Ensemble([made(make, k).to(dtype) for k in range(3)], **options)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_mixing_of_a_few_percent_is_found_in_half_precision(dtype, grad, planted):
    planted(0.06)
    members, ensemble = halves(lambda k: Network(), dtype)
    x = torch.randn(5, 4).to(dtype)
    with (
        torch.set_grad_enabled(grad),
        pytest.warns(UserWarning, match=r"in float32 the fold is|rounding allows|the fold is .* from member"),
    ):
        found = ensemble(x)
    expected = torch.stack([m(x) for m in members]).mean(0)
    assert relative_error(found, expected) < 1e-2
    assert ensemble.engine == "loop"


@pytest.mark.parametrize("dtype", HALVES)
def test_it_was_not_found_by_a_tolerance_alone(dtype, planted, monkeypatch):
    """The error that the check is for is within what the tolerance of half precision lets through."""
    planted(0.06 if dtype == torch.bfloat16 else 0.01)
    monkeypatch.setattr(structure.Structure, "problem", lambda self, leaves: None)
    members, ensemble = halves(lambda k: Network(), dtype)
    x = torch.randn(5, 4).to(dtype)
    with torch.no_grad():
        found = torch.stack([m(x) for m in members]).mean(0)
        assert 5e-4 < relative_error(ensemble(x), found) < TOLERANCE[dtype]
    assert ensemble.engine == "fold"


class Deep(nn.Module):
    """Adds up so much rounding that a tolerance for all networks would not do."""

    def __init__(self, depth):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(depth))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(3 * layer(x))
        return x


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "make", [lambda k: Network(), lambda k: Deep(3), lambda k: Deep(12)], ids=["", "deep", "deeper"]
)
def test_networks_in_half_precision_are_folded(make, dtype):
    members, ensemble = halves(make, dtype, engine="fold")
    for seed in range(3):
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed)).to(dtype)
        with torch.no_grad():
            found = ensemble.member_outputs(x)
            single = [made(make, k)(x.float()) for k in range(3)]
        for k, member in enumerate(members):
            own = relative_error(member(x), single[k])
            assert relative_error(found[k], single[k].to(dtype)) <= 4 * max(own, torch.finfo(dtype).eps)
    assert ensemble.engine == "fold"
    assert all(p.dtype == dtype for p in ensemble.parameters())


class CastsItself(nn.Module):
    """Runs in bfloat16 whatever it is given, or wants it."""

    def __init__(self, how):
        super().__init__()
        self.inner, self.how = nn.Linear(4, 4), how

    def forward(self, x):
        if self.how == "refuses" and x.dtype != torch.bfloat16:
            raise TypeError("bfloat16 only")
        if self.how == "asks":
            x = x.to(next(self.parameters()).dtype)
        if self.how == "fixed":
            x = x.to(torch.bfloat16)
        if self.how == "widens":
            return torch.nn.functional.linear(x.float(), self.inner.weight.float(), self.inner.bias.float()).to(x.dtype)
        return self.inner(x)


@pytest.mark.parametrize("how", ["refuses", "asks", "fixed", "widens"])
def test_networks_that_cast_themselves(how):
    members, ensemble = halves(lambda k: CastsItself(how), torch.bfloat16, engine="fold")
    x = torch.randn(5, 4).bfloat16()
    with torch.no_grad():
        for _ in range(2):
            assert relative_error(ensemble(x), averaged([m(x) for m in members])) < 1e-2
    assert ensemble.engine == "fold"


def test_autocast_is_held_in_float32_too(planted):
    planted(0.06)
    held = Held(lambda k: Network())
    x = torch.randn(5, 4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), pytest.warns(UserWarning, match="in float32"):
        held.ensemble(x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert relative_error(held.ensemble(x), averaged(held.loop(x))) < 1e-2


# What shows nothing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_of_zeros_hides_nothing(dtype, planted):
    planted(0.5)
    members = [made_zeroed(k, dtype) for k in range(3)]
    ensemble = fastens.Ensemble([made_zeroed(k, dtype) for k in range(3)])
    x = torch.randn(5, 4).to(dtype)
    with torch.no_grad(), pytest.warns(UserWarning, match="on drawn weights"):
        assert not ensemble(x).any()
    with torch.no_grad():
        for module in (*members, ensemble):
            for name, p in module.named_parameters():
                if "out.weight" in name:
                    p.fill_(0.1)
        assert relative_error(ensemble(x), averaged([m(x) for m in members])) < 1e-2


def made_zeroed(k, dtype=torch.float32):
    member = made(lambda j: Network(), k)
    nn.init.zeros_(member.out.weight)
    nn.init.zeros_(member.out.bias)
    return member.to(dtype)


class Gated(nn.Module):
    """A branch behind a gate that is closed at the start."""

    def __init__(self):
        super().__init__()
        self.inner, self.out, self.gate = nn.Linear(4, 4), nn.Linear(4, 4), nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.out(x) + self.gate * nn.functional.softsign(self.inner(x))


def closed(k):
    member = made(lambda j: Gated(), k)
    nn.init.zeros_(member.gate)
    return member


def test_a_closed_gate_hides_nothing(planted):
    planted(0.5)
    ensemble = fastens.Ensemble([closed(k) for k in range(3)])
    with torch.no_grad(), pytest.warns(UserWarning, match="on drawn weights"):
        ensemble(torch.randn(5, 4))


class ParametersOnly(Gated):
    """Looks at its parameters, and mixes rows behind a closed gate in one gradient mode only."""

    def __init__(self, mode):
        super().__init__()
        self.mode = mode

    def forward(self, x):
        assert isinstance(self.inner.weight, nn.Parameter)
        assert type(self.out.weight) is nn.Parameter
        h = nn.functional.softsign(self.inner(x)) if torch.is_grad_enabled() is self.mode else self.inner(x)
        return self.out(x) + self.gate * h


@pytest.mark.filterwarnings("ignore:fastens. members are evaluated one by one")
@pytest.mark.parametrize("mode", [False, True])
def test_drawn_weights_are_parameters_and_seen_in_the_calls_own_mode(mode, planted):
    planted(0.5)
    members = [made(lambda j: ParametersOnly(mode), k) for k in range(3)]
    for member in members:
        nn.init.zeros_(member.gate)
    ensemble, x = fastens.Ensemble(members), torch.randn(5, 4)
    with torch.set_grad_enabled(mode):
        ensemble(x)
        for module in (*members, ensemble):
            next(p for name, p in module.named_parameters() if name.endswith("gate")).data.fill_(1)
        near(ensemble(x).detach(), averaged([m(x).detach() for m in members]))


@pytest.mark.filterwarnings("ignore:fastens. members are evaluated one by one")
@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("mode", [False, True])
def test_a_parameter_is_one_to_type(engine, mode):
    class Typed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.register_buffer("base", torch.ones(4))

        def forward(self, x):
            plain = type(self.layer.weight) is nn.Parameter and type(self.base) is torch.Tensor
            kinds = [type(p) is nn.Parameter for p in self.parameters()]
            return self.layer(x) * (3 if plain and all(kinds) else 1)

    held, x = Held(lambda k: Typed()), torch.randn(5, 4)
    ensemble = fastens.Ensemble(held.members, engine=engine)
    with torch.set_grad_enabled(mode):
        for _ in range(3):
            near(ensemble(x).detach(), averaged(held.loop(x)).detach())


def test_a_context_of_zeros_hides_nothing(planted):
    planted(0.5)

    def make(k):
        network = Network(context=True)
        nn.init.zeros_(network.context.bias)
        network.context.bias.requires_grad_(False)
        return network

    held = Held(make)
    x = torch.randn(5, 4)
    with torch.no_grad(), pytest.warns(UserWarning, match="on drawn weights and inputs"):
        near(held.ensemble(x, torch.zeros(5, 4)), averaged(held.loop(x, torch.zeros(5, 4))))
    with torch.no_grad():
        context = torch.randn(5, 4)
        near(held.ensemble(x, context), averaged(held.loop(x, context)))


def test_rows_that_are_all_the_same_hide_nothing(planted):
    planted(0.5)
    held = Held(lambda k: Network())
    x = torch.randn(1, 4).expand(5, 4).clone()
    with torch.no_grad(), pytest.warns(UserWarning, match="the fold is"):
        near(held.ensemble(x), averaged(held.loop(x)))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "make",
    [lambda k: made_zeroed(k), lambda k: closed(k), lambda k: made(lambda j: Network(), 0)],
    ids=["head", "gate", "equal"],
)
def test_right_folds_pass_and_nothing_is_written(make, grad):
    ensemble = fastens.Ensemble([make(k) for k in range(3)], engine="fold")
    before = {name: t.clone() for name, t in ensemble.state_dict().items()}
    versions = [p._version for p in ensemble.parameters()]
    x = torch.randn(5, 4)
    expected = averaged([make(k)(x) for k in range(3)])
    kept, state = x.clone(), torch.get_rng_state()
    with torch.set_grad_enabled(grad):
        near(ensemble(x), expected)
    assert ensemble.engine == "fold"
    assert torch.equal(x, kept)
    assert torch.equal(torch.get_rng_state(), state)
    assert versions == [p._version for p in ensemble.parameters()]
    for name, t in ensemble.state_dict().items():
        assert torch.equal(t, before[name])


def test_a_nondegenerate_first_call_is_made_once(monkeypatch):
    calls = []
    monkeypatch.setattr(structure.Structure, "_answers", lambda self, drawn: calls.append(drawn))
    held = Held(lambda k: Network(), engine="fold")
    held.sampling(batch(5, 4))
    assert not calls
    halves_of = fastens.Ensemble([m.bfloat16() for m in held.members])
    with torch.no_grad():
        halves_of(torch.randn(5, 4).bfloat16())
    assert calls == [False]


@pytest.mark.skipif(not _native.load(), reason=f"no compiled library: {_native.status()}")
@pytest.mark.parametrize("rule", ["mean", "mixture"])
def test_an_audit_tells_a_change_from_the_rounding_of_half_precision(rule, monkeypatch):
    """Of six per cent, where a tolerance for any network in bfloat16 would be ten."""
    monkeypatch.setenv("FASTENS_AUDIT", "always")
    members, ensemble = halves(lambda k: Network(), torch.bfloat16, rule=rule)
    x = torch.randn(6, 4).bfloat16()
    with torch.no_grad(), ensemble.trajectory(6, 0), warnings.catch_warnings():
        warnings.simplefilter("error")  # rounding alone is no reason to drop a plan
        for _ in range(4):
            ensemble(x)
        assert ensemble.report().plans
        for p in ensemble.network.out.parameters():
            p.data.mul_(1.06)
    for member in members:
        for p in member.out.parameters():
            p.data.mul_(1.06)
    with torch.no_grad(), ensemble.trajectory(6, 0):
        with pytest.warns(UserWarning, match="call refresh"):
            found = ensemble(x)
        scores = torch.stack([member(x) for member in members]).float()
    expected = scores.mean(0) if rule == "mean" else found.float()
    assert relative_error(found.float(), expected) < 0.03


@pytest.mark.skipif(not _native.load(), reason=f"no compiled library: {_native.status()}")
def test_a_plan_is_held_beyond_rounding_on_other_inputs(monkeypatch):
    """A plan that is six per cent off on inputs that it was not recorded with is none."""
    run, calls = Entry.run, []

    def wrong(self, inputs, *args):
        calls.append(1)
        return [x * 1.06 if len(calls) == 2 else x for x in run(self, inputs, *args)]

    monkeypatch.setattr(Entry, "run", wrong)
    _, ensemble = halves(lambda k: Network(), torch.bfloat16)
    with torch.no_grad():
        ensemble(torch.randn(6, 4).bfloat16())
    assert len(calls) == 2
    assert not ensemble.report().plans
    assert "from the members" in ensemble.report().why_no_plan


class OtherDtype(nn.Module):
    """Returns another dtype in the fold, of values that are the same."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        h = self.layer(x).bfloat16()
        return h if type(h) is torch.Tensor else h.float()


@pytest.mark.parametrize("rule", ["mean", "alternating"])
def test_a_fold_of_another_dtype_is_no_fold(rule):
    held = Held(lambda k: OtherDtype())
    held.ensemble.rule = rule
    found = held.quietly(lambda: held.ensemble(torch.randn(5, 4)))
    assert found.dtype is torch.bfloat16
    assert held.ensemble.engine == "loop"


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_transformer_layer_in_autocast_is_the_members(norm_first):
    """Its fast path leaves autocast's dtype on a CPU, and its slow one does not."""
    held = Held(lambda k: nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True, norm_first=norm_first))
    with torch.autocast("cpu", torch.bfloat16):
        held.sampling(batch(2, 3, 4))
