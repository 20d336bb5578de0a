"""The arithmetic of plans is the network's own: each operation rounds where the network's does, to the bit."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastens
from fastens import _native
from fastens.engine import planned
from fastens.plan.lowering.elementwise import has_exact_reciprocal

TIMES = torch.arange(1000)
SIGMAS = torch.cat([torch.logspace(math.log10(0.002), math.log10(80), 1500), torch.tensor([0.002, 80.0])])


@pytest.fixture(params=["program", "launches"], autouse=True)
def _planned_as(request, monkeypatch):
    if request.param == "program" and not _native.load():
        pytest.skip(f"no compiled library: {_native.status()}")
    monkeypatch.setattr(planned, "launches_on", lambda _: request.param == "launches")


class Computed(nn.Module):
    """A function of the input, times a power of two that is the member's own."""

    def __init__(self, function, number):
        super().__init__()
        self.function, self.gain = function, nn.Parameter(torch.tensor([2.0**number]))
        self.linear = nn.Linear(1, 3)
        self.conv = nn.Conv2d(1, 3, 1)
        with torch.no_grad():  # whole numbers, whose sums are exact
            for parameter in (*self.linear.parameters(), *self.conv.parameters()):
                parameter.copy_(torch.arange(1.0 + number, 1 + number + parameter.numel()).view_as(parameter))

    def forward(self, x):
        return self.function(self, x) * self.gain


def planned_and_looped(function, x, num_members=2):
    """What the plan and the loop over the members give."""
    members = [Computed(function, k).eval() for k in range(num_members)]
    ensemble = fastens.Ensemble(members, engine="fold")
    with torch.no_grad():
        for _ in range(3):  # recorded, then planned
            outputs = ensemble.member_outputs(x)
        assert ensemble.report().plans, ensemble.report().why_no_plan
        return outputs, torch.stack([member(x) for member in members])


class Looked(nn.Module):
    """An embedding of the row that a time is scaled to."""

    def __init__(self, divisor):
        super().__init__()
        self.divisor, self.rows = divisor, nn.Embedding(1001, 4)

    def forward(self, x, t):
        return x + self.rows((t.float() / self.divisor * self.divisor).long())


@pytest.mark.parametrize("divisor", [3, 7, 10, 1000, 999])
def test_a_scaled_time_looks_up_the_row_that_the_members_look_up(divisor):
    torch.manual_seed(0)
    members = [Looked(divisor).eval() for _ in range(2)]
    ensemble, x = fastens.Ensemble(members, engine="fold"), torch.zeros(len(TIMES), 4)
    with torch.no_grad():
        for _ in range(3):
            outputs = ensemble.member_outputs(x, TIMES)
        assert ensemble.report().plans, ensemble.report().why_no_plan
        assert torch.equal(outputs, torch.stack([member(x, TIMES) for member in members]))


DIVISORS = (3, 7, 10, 1000, 999, 0.1, math.sqrt(2), -3.0, 1e-3, 3e38, 1e-39, 2.0**-130, 2.0**127, 0.5, 0.0, math.inf)


@pytest.mark.parametrize("divisor", DIVISORS)
def test_a_division_by_a_number_is_torchs(divisor):
    x = torch.cat([TIMES.float(), -SIGMAS, torch.tensor([0.0, -0.0, 1e-38, 1e-45, 3e38, math.inf, math.nan])])
    planned, looped = planned_and_looped(lambda _, x: x / divisor, x[:, None])
    torch.testing.assert_close(planned, looped, rtol=0, atol=0, equal_nan=True)


def pixel(x):
    return x[:, :, None, None]


def in_a_part(whole, x):
    whole[:, 1:] = x
    return whole


def many(x):
    """Two of each, brought to the batch as networks bring timesteps to it."""
    return (x * torch.ones(len(x), 1, dtype=x.dtype)).repeat(2, 1)


CHAINS = {
    "two factors": lambda _, x: x * 0.1 * 0.7,
    "a factor and its reciprocal": lambda _, x: x * 1e-3 * 1e3,
    "a factor that overflows, and back": lambda _, x: x * 1e38 * 1e-38,
    "two divisors": lambda _, x: x / 3 / 7,
    "divided and multiplied": lambda _, x: x / 1000 * 1000,
    "shifted and divided": lambda _, x: (x - 0.3) / 0.7 + 0.1,
    "a number over": lambda _, x: 1000 / (x + 1),
    "a number minus": lambda _, x: 1000.1 - x,
    "a reciprocal": lambda _, x: (x + 0.1).reciprocal(),
    "a power of -1": lambda _, x: (x + 0.1) ** -1,
    "a square": lambda _, x: (x * 0.1) ** 2,
    "tensors": lambda _, x: (x * x + x) / (x + 3) - x,
    "alpha": lambda _, x: torch.add(x, x * x, alpha=0.1),
    "alpha by position": lambda _, x: torch.ops.aten.add.Scalar(x, 2.0, 0.1),
    "bfloat16": lambda _, x: x.bfloat16().float() / 3,
    "bfloat16 of a product": lambda _, x: (x * 0.1).bfloat16().float() * 3,
    "bfloat16 of whole numbers": lambda _, x: x.long().to(torch.bfloat16).float() + 1,
    "bfloat16 in another layout": lambda _, x: torch.cat([x, 1 - x], 1).bfloat16().t().contiguous().float().t(),
    "bfloat16 in place of other numbers": lambda _, x: torch.zeros_like(x, dtype=torch.bfloat16).copy_(x).float() * 3,
    "bfloat16 in a part": lambda _, x: in_a_part(torch.zeros(len(x), 2, dtype=torch.bfloat16), x).float() * 3,
    "bfloat16, enlarged": lambda _, x: F.interpolate(pixel(x).bfloat16(), scale_factor=2).float()[:, :, 1, 0] * 3,
    "bfloat16, padded": lambda _, x: F.pad(pixel(x).bfloat16(), (1, 0, 0, 1)).float()[:, :, 0, 1] * 3,
    "half": lambda _, x: (x * 100).half().float(),
    "large whole numbers": lambda _, x: torch.remainder(many(x.long() + 2**24), 1000).float(),
    "a mean": lambda _, x: torch.cat([x, x * 0.1, x + 1], 1).mean(1, keepdim=True),
    "a linear layer, divided": lambda net, x: net.linear(x) / 1000,
    "a linear layer, times two factors": lambda net, x: net.linear(x) * 0.1 * 0.7,
    "a linear layer, multiplied and divided": lambda net, x: net.linear(x) * 1000 / 1000,
    "a linear layer, divided twice": lambda net, x: net.linear(x) / 3 / 7,
    "a convolution, divided": lambda net, x: net.conv(x[:, :, None, None]) / 7,
    "a convolution and its input, divided": lambda net, x: (net.conv(x[:, :, None, None]) + x[:, :, None, None]) / 7,
    "a convolution, divided and added": lambda net, x: net.conv(x[:, :, None, None]) / 7 + x[:, :, None, None] * 0.1,
}


@pytest.mark.parametrize("chain", CHAINS)
def test_a_chain_rounds_where_the_network_rounds(chain):
    whole = "linear" in chain or "convolution" in chain  # whose products of whole numbers are exact
    for x in (TIMES.float(),) if whole else (TIMES.float(), SIGMAS):
        planned, looped = planned_and_looped(CHAINS[chain], x[:, None])
        torch.testing.assert_close(planned, looped, rtol=0, atol=0, equal_nan=True)


class Converted(nn.Module):
    """What is rounded, and what is not."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return x.bfloat16().float(), self.linear(x)


def test_what_is_returned_is_rounded_too():
    x, ensemble = torch.randn(4, 8), fastens.Ensemble([Converted().eval() for _ in range(2)], engine="fold")
    with torch.no_grad():
        for _ in range(3):
            rounded, _ = ensemble.member_outputs(x)
        assert ensemble.report().plans, ensemble.report().why_no_plan
    assert torch.equal(rounded[0], x.bfloat16().float())


@pytest.mark.parametrize("far", [0.0, 90.0, 95.0])
def test_weights_by_hand_of_what_is_far_away_are_finite(far):
    x = torch.rand(4, 8, generator=torch.Generator().manual_seed(0)) + far
    planned, looped = planned_and_looped(lambda _, x: (-x).exp() / (-x).exp().sum(1, keepdim=True), x)
    torch.testing.assert_close(planned, looped, rtol=1e-3, atol=0)  # subnormal numbers have few digits


def sinusoidal(x, scale, max_period=1e4):
    angles = x * scale * torch.exp(-math.log(max_period) * torch.arange(32.0) / 32)
    return torch.cat([angles.sin(), angles.cos()], 1)


EMBEDDINGS = {
    "a time": (lambda _, t: sinusoidal(t, 1), TIMES.float()),
    "a share of the times": (lambda _, t: sinusoidal(t / 1000, 1000), TIMES.float()),
    "times of another number of steps": (lambda _, t: sinusoidal(t / 7, 1000 / 7), TIMES.float()),
    "a quarter of the logarithm of sigma": (lambda _, s: sinusoidal(s.log() / 4, 1000), SIGMAS),
    "a share of the logarithm of sigma": (lambda _, s: sinusoidal(s.log() / 3, 1), SIGMAS),
    "sigma": (lambda _, s: sinusoidal(s, 2 * math.pi * 16), SIGMAS),
    "EDM's factors": (lambda _, s: torch.cat([1 / (s**2 + 0.25).sqrt(), s * 0.5 / (s**2 + 0.25).sqrt()], 1), SIGMAS),
}


@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_embeddings_are_as_exact_as_the_members(embedding):
    function, x = EMBEDDINGS[embedding]
    planned, looped = planned_and_looped(function, x[:, None])
    exact = torch.stack([Computed(function, k).double()(x[:, None].double()) for k in range(2)])
    errors = [(given - exact).abs().max().item() for given in (planned, looped)]
    assert errors[0] <= 1.1 * errors[1]


def test_only_powers_of_two_have_an_exact_reciprocal():
    x = torch.randint(-(2**31), 2**31, (5000,), generator=torch.Generator().manual_seed(0)).int().view(torch.float32)
    for exponent in (-127, -126, -1, 0, 1, 126, 127):
        number = 2.0**exponent
        same = torch.equal((x / number).nan_to_num(), (x * (1 / number)).nan_to_num())
        assert same or not has_exact_reciprocal(number)
    assert has_exact_reciprocal(-4.0)
    for number in (3.0, 0.1, 0.0, math.inf, math.nan):
        assert not has_exact_reciprocal(number)
