"""Derivatives along a direction from one planned pass: exact, for every planned network, and never stale."""

import copy

import pytest
import torch
from torch import nn

import fastens
from fastens import _native
from fastens.engine.jvp import outputs_and_jvp
from fastens.evaluation import Denoiser
from fastens.evaluation.ode import AugmentedFlow
from fastens.schedules import VP, Discrete, Prediction
from tests.networks import NETWORKS, randomised, small_unet, tensor_of
from tests.tolerances import NETWORK, relative_error

pytestmark = pytest.mark.skipif(not _native.load(), reason=f"no compiled library: {_native.status()}")

WITHOUT = {"gru", "gru_time_first"}  # recurrent layers have no plan


def derivative(member, args, kwargs, tangent):
    """By going backward twice, which every operation can."""
    x = args[0].detach().requires_grad_()
    output = tensor_of(member(x, *args[1:], **kwargs))
    probe = torch.zeros_like(output, requires_grad=True)
    (back,) = torch.autograd.grad(output, x, probe, create_graph=True)
    return output.detach(), torch.autograd.grad(back, probe, tangent)[0]


@pytest.mark.parametrize("name", NETWORKS)
def test_value_and_derivative_are_the_members(name):
    make, arguments = NETWORKS[name]
    members = [randomised(make, seed) for seed in range(2)]
    ensemble = fastens.Ensemble(members, engine="fold")
    args, kwargs = arguments(3)
    position = next(i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.ndim > 1)
    for factor in (1.0, -0.6):  # recorded, planned
        moved = tuple(a * factor if i == position else a for i, a in enumerate(args))
        tangent = torch.randn(args[position].shape, generator=torch.Generator().manual_seed(3))
        found = outputs_and_jvp(ensemble._engine, moved, kwargs, tangent)
        assert (found is None) == (name in WITHOUT), ensemble.report().why_no_plan
        if found is None or position:
            continue
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            pairs = [derivative(member, moved, kwargs, tangent) for member in members]
        expected = [torch.stack(part) for part in zip(*pairs, strict=True)]
        assert relative_error(found[0], expected[0]) < NETWORK[torch.float32]
        assert relative_error(found[1], expected[1]) < NETWORK[torch.float32]


class Written(nn.Module):
    """Tensors that are written part by part: from the batch, from constants, over each other, and not at all."""

    def __init__(self, order):
        super().__init__()
        self.order = order
        self.inner, self.outer = nn.Linear(4, 4), nn.Linear(8, 4)

    def forward(self, x, t):
        h = self.inner(x)
        parts = {
            "batch": (slice(0, 4), h),
            "constant": (slice(2, 6), torch.full((1,), 0.7)),
            "time": (slice(5, 8), t.view(-1, 1)),
            "broadcast": (slice(3, 8), h[:, :1]),
        }
        both = h.new_zeros(len(h), 8) if self.order[0] == "zeros" else h.new_empty(len(h), 8)
        for name in self.order[1:]:
            where, value = parts[name]
            both[:, where] = value
        whole = torch.zeros_like(both)
        whole.copy_(both.square())
        return self.outer(whole) + h


@pytest.mark.parametrize(
    "order",
    [
        ("zeros", "batch"),
        ("zeros", "constant", "batch"),
        ("zeros", "batch", "constant"),
        ("zeros", "time", "broadcast"),
        ("empty", "broadcast", "constant", "batch"),
        ("empty", "batch", "constant", "time"),
        ("empty", "time", "constant", "broadcast", "batch"),
        ("zeros", "constant", "time"),
    ],
    ids="-".join,
)
def test_writing_to_parts(order):
    check_against_jvp([randomised(lambda: Written(order), seed) for seed in range(2)])


def check_against_jvp(members):
    ensemble = fastens.Ensemble(members, engine="fold")
    generator = torch.Generator().manual_seed(1)
    t = torch.rand(3, generator=generator)
    for _ in range(2):  # recorded, planned
        x, tangent = (torch.randn(3, 4, generator=generator) for _ in range(2))
        found = outputs_and_jvp(ensemble._engine, (x, t), {}, tangent)
        assert found is not None, ensemble.report().why_no_plan
        for k, member in enumerate(members):
            value, moved = torch.func.jvp(lambda y, m=member: m(y, t), (x,), (tangent,))
            assert relative_error(found[0][k], value) < NETWORK[torch.float32]
            assert relative_error(found[1][k], moved) < NETWORK[torch.float32]


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x, t, mask):
        q, k, v = (layer(x).unflatten(-1, (2, 2)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return nn.functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2) + t


class Steps(nn.Module):
    """What is a step function of the input has no derivative, however large the input."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, t, places):
        h = self.inner(x)
        kept = torch.zeros(h.shape, dtype=torch.int64)
        kept[..., :2] = h[..., :2]
        return self.outer(h.pow(0) + h.to(torch.int32).float() + kept.float() * places + h.square()) + t


@pytest.mark.parametrize(("kind", "small"), [(Masked, 0.0), (Steps, 0.001)])
def test_what_only_later_values_show(kind, small):
    members = [randomised(kind, seed) for seed in range(2)]
    ensemble = fastens.Ensemble(members, engine="fold")
    generator = torch.Generator().manual_seed(1)
    for size in (small, small, 4.0):
        x, tangent = (torch.randn(3, 5, 4, generator=generator) * max(size, 0.01) for _ in range(2))
        mask = torch.randn((3, 1, 5, 5) if kind is Masked else (1, 1, 1), generator=generator) * size
        rest = torch.rand(3, 1, 1, generator=generator), mask
        found = outputs_and_jvp(ensemble._engine, (x, *rest), {}, tangent)
        for k, member in enumerate(members):
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                value, moved = torch.func.jvp(lambda y, m=member, r=rest: m(y, *r), (x,), (tangent,))
            if found is not None:
                assert relative_error(found[0][k], value) < NETWORK[torch.float32]
                assert relative_error(found[1][k], moved) < NETWORK[torch.float32]
    assert found is not None, ensemble.report().why_no_plan


FUNCTIONS = {
    "square": lambda h: h.square() + h.pow(3),
    "roots": lambda h: (h.square() + 1).sqrt() - (h * h + 2).rsqrt(),
    "quotient": lambda h: h / (1 + h.square()) + 3 / (h.exp() + 1) + (h * h + 1).reciprocal(),
    "waves": lambda h: h.sin() * h.cos(),
    "logarithm": lambda h: (h.square() + 0.5).log(),
}


class Elementwise(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.inner, self.outer = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x, t):
        return self.outer(self.function(self.inner(x))) + t.view(-1, 1)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_elementwise_functions(name):
    members = [randomised(lambda: Elementwise(FUNCTIONS[name]), seed) for seed in range(2)]
    check_against_jvp(members)


class FarFromZero(nn.Module):
    """A normalisation of values whose mean is several times their deviation."""

    def __init__(self):
        super().__init__()
        self.inner, self.norm, self.outer = nn.Conv2d(2, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.Conv2d(16, 2, 1)

    def forward(self, x):
        return self.outer(torch.nn.functional.silu(self.norm(self.inner(x) + 4)))


def test_normalisation_far_from_zero():
    members = [randomised(FarFromZero, seed) for seed in range(2)]
    ensemble = fastens.Ensemble(members, engine="fold")
    generator = torch.Generator().manual_seed(2)
    x, tangent = (torch.randn(3, 2, 12, 12, generator=generator) for _ in range(2))
    found = outputs_and_jvp(ensemble._engine, (x,), {}, tangent)
    assert found is not None, ensemble.report().why_no_plan
    for k, member in enumerate(members):
        x64, tangent64 = x.double(), tangent.double()
        _, moved = torch.func.jvp(copy.deepcopy(member).double(), (x64,), (tangent64,))
        assert relative_error(found[1][k], moved) < NETWORK[torch.float32]


class Odd(nn.Module):
    """An operation whose derivative no rule knows."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x, t):
        return torch.erf(self.inner(x)) * t.view(-1, 1)


def test_an_unknown_operation_is_left_to_autograd():
    ensemble = fastens.Ensemble([randomised(Odd, seed) for seed in range(2)], engine="fold")
    x, t = torch.randn(3, 4), torch.ones(3)
    assert outputs_and_jvp(ensemble._engine, (x, t), {}, x) is None
    assert "the derivative of aten.erf is not known here" in ensemble.report().why_no_plan
    assert outputs_and_jvp(ensemble._engine, (x, t), {}, x) is None
    flow = AugmentedFlow(Denoiser(ensemble, VP()), x.sign().unsqueeze(0))
    assert all(torch.isfinite(part).all() for part in flow(torch.tensor(0.5), (x, torch.zeros(3))))


def test_changed_weights_and_modes():
    ensemble = fastens.Ensemble([randomised(small_unet, seed) for seed in range(2)], engine="fold").eval()
    x, t = NETWORKS["unet_2d"][1](2)[0][:2]
    first = outputs_and_jvp(ensemble._engine, (x, t), {}, x)
    with torch.no_grad():
        next(p for n, p in ensemble.named_parameters() if "conv_out.weight" in n).mul_(2)
    second = outputs_and_jvp(ensemble._engine, (x, t), {}, x)
    assert first is not None
    assert second is not None
    assert relative_error(second[1], 2 * first[1]) < 1e-5
    ensemble.train()  # nothing in this network depends on it
    assert relative_error(outputs_and_jvp(ensemble._engine, (x, t), {}, x)[1], second[1]) < 1e-5
    ensemble.network.double()
    assert outputs_and_jvp(ensemble._engine, (x.double(), t), {}, x.double()) is None


@pytest.mark.covering(1)
@pytest.mark.parametrize("rule", ["mean", "geometric", "dominant", fastens.rules.Mean((0.2, 0.8))], ids=str)
@pytest.mark.parametrize(
    ("prediction", "aggregate_in", "probes"),
    [
        ("epsilon", None, 1),
        ("v", "x0", 3),
        ("x0", None, None),
        (Prediction("edm", sigma_data=0.5, input_scaling="unit_variance"), "x0", 1),
    ],
    ids=["epsilon", "v in x0", "x0, exact", "preconditioned in x0"],
)
def test_flow_is_the_same_forward_and_backward(rule, prediction, aggregate_in, probes, monkeypatch):
    schedule = Discrete.linear()
    ensemble = fastens.Ensemble(
        [randomised(small_unet, seed) for seed in range(2)],
        rule,
        prediction=prediction,
        aggregate_in=aggregate_in,
        schedule=schedule,
    )
    x = NETWORKS["unet_2d"][1](2)[0][0]
    x = x[..., :8, :8] if probes is None else x
    drawn = None if probes is None else torch.randn(probes, *x.shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor(400.0, dtype=torch.float64)
    denoiser = Denoiser(ensemble, schedule, prediction)
    forward = AugmentedFlow(denoiser, drawn)(t, (x, torch.zeros(len(x))))
    assert any("aten.native_group_norm_backward.default" in plan for plan in ensemble.report().plans)
    monkeypatch.setattr(Denoiser, "outputs_and_jvp", lambda *_: None)
    backward = AugmentedFlow(denoiser, drawn)(t, (x, torch.zeros(len(x))))
    for a, b in zip(forward, backward, strict=True):
        assert relative_error(a, b) < 1e-4


def test_fixed_dropout_masks():
    schedule = Discrete.linear()
    ensemble = fastens.MCDropout(randomised(small_unet, 0), 3, p=0.1)
    x = NETWORKS["unet_2d"][1](2)[0][0]
    found = outputs_and_jvp(ensemble._engine, (x, schedule.network_time(torch.full((2,), 300.0)).float()), {}, x)
    assert found is not None
    assert relative_error(found[1][0], found[1][1]) > 1e-3
    for k, member in enumerate(ensemble.members):
        expected = derivative(member, (x, torch.full((2,), 300.0)), {}, x)[1]
        assert relative_error(found[1][k], expected) < NETWORK[torch.float32]
