"""Function transforms, export and inference mode around the ensemble."""

import copy
import warnings

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn

import fastens
from tests.fold.contract import Held, K, averaged, batch, made, near

VECTORS = batch(5, 4)


class Network(nn.Module):
    def __init__(self, reads=False, mixes=True):
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(4, 8), nn.Linear(8, 4), nn.LayerNorm(4)
        self.reads, self.mixes = reads, mixes

    def forward(self, x, t=1.0):
        h = self.norm(self.second(torch.tanh(self.first(x)))) * t
        if not self.mixes:
            return h
        return h * float(self.first.bias.detach()[0]) if self.reads else h - 0.5 * h.mean(0)


def loop_of(members):
    return lambda *args: averaged([m(*args) for m in members])


TRANSFORMS = {
    "vmap": lambda f, x, v: torch.func.vmap(f)(torch.stack([x, v])),
    "vmap over the last dimension": lambda f, x, v: torch.func.vmap(f, -1, -1)(torch.stack([x, v], -1)),
    "vmap over times": lambda f, x, v: torch.func.vmap(f, (None, 0))(x, torch.tensor([0.5, 2.0])),
    "vmap of vmap": lambda f, x, v: torch.func.vmap(torch.func.vmap(f))(torch.stack([x, v])[None]),
    "jvp": lambda f, x, v: torch.func.jvp(f, (x,), (v,)),
    "vjp": lambda f, x, v: torch.func.vjp(f, x)[1](v)[0],
    "jacrev": lambda f, x, v: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x, v: torch.func.jacfwd(f)(x),
    "grad": lambda f, x, v: torch.func.grad(lambda y: (f(y) * v).sum())(x),
    "hessian": lambda f, x, v: torch.func.hessian(lambda y: f(y).square().sum())(x[:2]),
    "vmap of jvp": lambda f, x, v: torch.func.vmap(lambda w: torch.func.jvp(f, (x,), (w,))[1])(torch.stack([v, x])),
    "vmap of grad": lambda f, x, v: torch.func.vmap(torch.func.grad(lambda y: f(y).sum()))(torch.stack([x, v])),
    "divergence": lambda f, x, v: (torch.func.vjp(f, x)[1](v)[0] * v).sum(1),
}  # fmt: skip


@pytest.mark.parametrize("enabled", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_around_the_ensemble(name, enabled):
    generator = torch.Generator().manual_seed(0)
    x, v = torch.randn(3, 4, generator=generator), torch.randn(3, 4, generator=generator)
    for engine in ("fold", "loop"):
        held = Held(lambda k: Network(), 2, engine=engine)
        with torch.set_grad_enabled(enabled):
            expected = TRANSFORMS[name](loop_of(held.members), x, v)
            near(TRANSFORMS[name](held.ensemble, x, v), expected, 1e-4)
            held.sampling(batch(3, 4))
            near(TRANSFORMS[name](held.ensemble, x, v), expected, 1e-4)
        held.gradients(batch(3, 4))
        assert held.ensemble.engine == engine
        assert not held.warned


@pytest.mark.parametrize("name", ["jvp", "vjp", "jacrev", "grad", "vmap"])
def test_transforms_of_looped_members(name):
    held = Held(lambda k: Network(reads=True), 2)
    held.sampling(batch(3, 4))
    x, v = torch.randn(3, 4), torch.randn(3, 4)
    near(TRANSFORMS[name](held.ensemble, x, v), TRANSFORMS[name](loop_of(held.members), x, v), 1e-4)


@pytest.mark.parametrize("name", ["vmap", "jvp", "grad"])
@pytest.mark.parametrize("rule", ["median", "sum", "dominant"])
def test_transforms_under_rules(rule, name):
    held = Held(lambda k: Network(), rule=rule)
    x, v = torch.randn(3, 4), torch.randn(3, 4)

    def f(*args):
        stack = torch.stack([m(*args) for m in held.members])
        if rule == "dominant":
            return stack.gather(0, stack.abs().argmax(0, keepdim=True))[0]
        return stack.sum(0) if rule == "sum" else stack.median(0).values

    near(TRANSFORMS[name](held.ensemble, x, v), TRANSFORMS[name](f, x, v), 1e-4)


@pytest.mark.parametrize("engine", ["fold", "loop"])
@pytest.mark.parametrize("enabled", [False, True])
def test_tangents_of_dual_numbers(enabled, engine):
    held = Held(lambda k: Network(), engine=engine)
    x, v = torch.randn(3, 4), torch.randn(3, 4)
    for _ in range(2):
        with torch.set_grad_enabled(enabled), forward_ad.dual_level():
            given = forward_ad.make_dual(x, v)
            found, expected = (
                forward_ad.unpack_dual(held.ensemble(given)),
                forward_ad.unpack_dual(averaged([m(given) for m in held.members])),
            )
            near((found.primal, found.tangent), (expected.primal, expected.tangent), 1e-4)
        held.sampling(batch(3, 4))


class Transforming(nn.Module):
    """Differentiates or maps a part of itself, at the input or at what differs between members."""

    def __init__(self, transform, member_valued):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.transform, self.member_valued = transform, member_valued

    def part(self, h):
        return torch.tanh(self.second(h))

    def forward(self, x):
        h = self.first(x) if self.member_valued else x
        found = TRANSFORMS[self.transform](self.part, h, torch.ones_like(h))
        return found[1] if isinstance(found, tuple) else found


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("member_valued", [False, True], ids=["common", "member-valued"])
@pytest.mark.parametrize("name", ["vmap", "jvp", "vjp", "jacrev", "jacfwd", "grad", "vmap of jvp", "vmap of grad"])
def test_transforms_inside_a_network(name, member_valued, trains):
    held = Held(lambda k: Transforming(name, member_valued).requires_grad_(trains), 2)
    held.sampling(batch(3, 4))
    held.gradients(batch(3, 4))


@pytest.mark.parametrize("called", [False, True], ids=["before any call", "after calls"])
@pytest.mark.parametrize("kind", [nn.Dropout, nn.AlphaDropout])
def test_transforms_of_dropout_masks(kind, called):
    """Under fixed masks; each transform against calls of the ensemble."""
    ensemble = fastens.MCDropout(nn.Sequential(nn.Linear(4, 8), kind(0.4), nn.Linear(8, 4)), 3)
    x, v = torch.randn(5, 4), torch.randn(5, 4)
    if called:
        ensemble(x)
    near(torch.func.vmap(ensemble)(torch.stack([x, v])), torch.stack([ensemble(x), ensemble(v)]))
    near(torch.func.jvp(ensemble, (x,), (v,)), (ensemble(x), ensemble(x + v) - ensemble(x)), 1e-4)  # it is affine
    given = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(ensemble(given).square().sum(), given)
    near(torch.func.grad(lambda x: ensemble(x).square().sum())(x), expected)
    near(ensemble(x), ensemble(given).detach())  # nothing of a transform was kept


def test_vmap_refuses_what_is_drawn_in_each_call():
    members = [nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.4)).eval() for _ in range(2)]
    for ensemble in (fastens.Ensemble(members, "alternating"), fastens.MCDropout(members[0], 2, masks="fresh")):
        with pytest.raises(
            RuntimeError, match=r"torch\.func\.vmap makes one call of many; call the ensemble on the whole"
        ):
            torch.func.vmap(ensemble, randomness="different")(torch.randn(2, 5, 4))


def test_functional_calls_over_stacks_of_weights():
    held = Held(lambda k: Network(), 2)
    x = torch.randn(3, 4)
    names = dict(held.ensemble.named_parameters())
    scaled = {name: torch.stack([p.detach(), 0.5 * p.detach()]) for name, p in names.items()}
    found = torch.func.vmap(lambda weights: torch.func.functional_call(held.ensemble, weights, (x,)))(scaled)
    with torch.no_grad():
        near(found[0], averaged(held.loop(x)))
        for member in held.members:
            for p in member.parameters():
                p.mul_(0.5)
        near(found[1], averaged(held.loop(x)))


GIVEN = {
    "its own": lambda parameters: dict(parameters),
    "detached": lambda parameters: {name: p.detach() for name, p in parameters},
    "others": lambda parameters: {name: (0.5 * p).detach().requires_grad_() for name, p in parameters},
}


@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
def test_functional_calls_leave_the_callers_weights_as_they_are(given, engine):
    held = Held(lambda k: Network(), engine=engine)
    x = torch.randn(3, 4)
    weights = given(held.ensemble.named_parameters())
    before = dict(weights)

    def loss(call, weights):
        return torch.func.functional_call(call, weights, (x,)).square().sum()

    def loss_of_members(weights):
        mine = [
            {name: weights[f"network.{name}"][k] for name, _ in held.members[0].named_parameters()} for k in range(K)
        ]
        outputs = [torch.func.functional_call(m, w, (x,)) for m, w in zip(held.members, mine, strict=True)]
        return torch.stack(outputs).mean(0).square().sum()

    for _ in range(2):
        near(loss(held.ensemble, weights), loss_of_members(weights))
        assert all(weights[name] is tensor for name, tensor in before.items())
        found = torch.func.grad(lambda weights: loss(held.ensemble, weights))(weights)
        near(found, torch.func.grad(loss_of_members)(weights))
        assert all(type(gradient) is torch.Tensor for gradient in found.values())
        held.sampling(batch(3, 4))


@pytest.mark.parametrize("first", [False, True], ids=["before any call", "after calls"])
@pytest.mark.parametrize("rule", ["mean", "median"])
def test_an_export_with_a_dynamic_batch(rule, first):
    held = Held(lambda k: Network(), rule=rule)

    def expected(*args):
        stack = torch.stack(held.loop(*args))
        return stack.mean(0) if rule == "mean" else stack.median(0).values

    with torch.no_grad():
        if first:
            held.ensemble(torch.randn(5, 4), torch.ones(5, 1))
        rows = torch.export.Dim.DYNAMIC
        program = torch.export.export(
            held.ensemble, (torch.randn(5, 4), torch.ones(5, 1)), dynamic_shapes=({0: rows}, {0: rows})
        )
        for count in (5, 2, 9):
            x, t = torch.randn(count, 4), torch.rand(count, 1)
            near(program.module()(x, t), expected(x, t))
            near(held.ensemble(x, t), expected(x, t))


# Inference mode


@pytest.mark.parametrize("engine", ["auto", "fold", "loop", "apart"])
@pytest.mark.parametrize("made_inside", [True, False], ids=["members too", "ensemble only"])
def test_an_ensemble_that_is_built_in_inference_mode(made_inside, engine):
    def make(k):
        member = Network()
        member.register_buffer("unused", torch.ones(3))
        member.number = k if engine == "apart" else 0
        return member

    members = [made(make, k) for k in range(K)]
    with torch.inference_mode(made_inside):
        given = [made(make, k) for k in range(K)]
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ensemble = fastens.Ensemble(given, engine=engine.replace("apart", "auto"))
        x = torch.randn(3, 4)
        for _ in range(3):
            near(ensemble(x), averaged([m(x) for m in members]))
    x = torch.randn(3, 4)
    with torch.no_grad():
        for _ in range(3):
            near(ensemble(x), averaged([m(x) for m in members]))
    for mode in (True, False):
        ensemble.train(mode)
        near(ensemble(x), averaged([m(x) for m in members]))
    if engine != "apart":
        loss = ensemble(x).square().sum()
        loss.backward()
        assert all(p.grad is not None for p in ensemble.parameters())
    with torch.inference_mode():
        near(ensemble(x), averaged([m(x) for m in members]))


# Drawn rules in the loop


class Banked(nn.Module):
    """Takes tables whose leading size may be the batch's, and is not."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x, bank, scale=None):
        h = self.inner(x)
        h = h + torch.softmax(h @ bank.T, 1) @ bank
        return h if scale is None else h * scale.sum()


@pytest.mark.parametrize("engine", ["auto", "loop", "apart"])
@pytest.mark.parametrize("rule", ["alternating", "mixture"])
def test_an_argument_of_the_batchs_size_that_carries_no_batch(rule, engine):
    def make(k):
        network = Banked()
        network.number = k if engine == "apart" else 0
        return network

    held = Held(make, engine=engine.replace("apart", "auto"))
    for entries in (5, 7, 5):
        held.drawn(lambda g, n=entries: (torch.randn(5, 4, generator=g), torch.randn(n, 4, generator=g)), rule)
    held.drawn(lambda g: tuple(torch.randn(5, 4, generator=g) for _ in range(3)), rule)


def test_parameters_that_are_frozen_stay_frozen():
    members = [nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)) for _ in range(2)]
    ensemble, x = fastens.Ensemble(members), torch.randn(3, 4)
    ensemble(x)
    ensemble.requires_grad_(False)
    for given in (x, x.clone().requires_grad_(), x):
        ensemble(given)
        assert not any(p.requires_grad for p in ensemble.parameters())


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_gradients_of_instance_norm_by_running_statistics(format):
    """They do not depend on how the gradient of the output is laid out, as torch's own do."""
    members = [nn.InstanceNorm2d(4, affine=True, track_running_stats=True).double().eval() for _ in range(2)]
    for k, m in enumerate(members):
        m.running_var.fill_(k + 1.0)
    ensemble = fastens.Ensemble(members)
    x = torch.randn(1, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(1, 4, 3, 3, dtype=torch.float64).contiguous(memory_format=format)
    (gradient,) = torch.autograd.grad(ensemble(x), x, direction)
    rate = sum(1 / (m.running_var + m.eps).sqrt() for m in members) / 2
    assert float((gradient - direction * rate.view(1, 4, 1, 1)).abs().max()) < 1e-12


def normed(k):
    torch.manual_seed(k)
    return nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)).train()


OUTLIVED = {
    "grad": lambda f, x: torch.func.grad(lambda z: f(z).sum())(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[0],
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,))[1],
    "grad of grad": lambda f, x: torch.func.grad(lambda y: torch.func.grad(lambda z: f(z).square().sum())(y).sum())(x),
}


@pytest.mark.filterwarnings("ignore:fastens. members are evaluated one by one")
@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("kind", OUTLIVED)
def test_buffers_written_in_a_transform_outlive_it(kind, called, engine):
    """They are ordinary tensors afterwards, as a member's are, and can be copied."""
    members, x = [normed(k) for k in range(3)], torch.randn(2, 8)
    ensemble = fastens.Ensemble([normed(k) for k in range(3)], engine=engine)

    def loop(z):
        return torch.stack([member(z) for member in members]).mean(0)

    if called:
        near(ensemble(x).detach(), loop(x).detach())
    near(OUTLIVED[kind](ensemble, x).detach(), OUTLIVED[kind](loop, x).detach())
    for copied in (ensemble, copy.deepcopy(ensemble)):
        for ours, theirs in zip(copied.members, members, strict=True):
            for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
                near(a, b)
    near(ensemble(x).detach(), loop(x).detach())
