"""What networks do beside layers has a plan: masks, writes to parts, numbers of other kinds, derivatives inside."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastens
from fastens import _native
from fastens.engine import planned
from fastens.trace.record import record, trace_of
from tests.tolerances import NETWORK, OP, relative_error

pytestmark = pytest.mark.skipif(not _native.load(), reason=f"no compiled library: {_native.status()}")

FORMS = {}


def form(*others):
    """Register a forward of :class:`Net`; ``others`` make what it takes after x."""

    def register(function):
        FORMS[function.__name__] = (function, others)
        return function

    return register


class Net(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.a, self.b, self.table = nn.Linear(8, 8), nn.Linear(8, 8), nn.Embedding(20, 8)
        self.name = name

    def forward(self, *args):
        return FORMS[self.name][0](self, *args)


def some(i):
    return torch.tensor([True, i % 2 == 0, False, True])


def numbers(i):
    return torch.tensor([1, 2, i, 4])


@form(some)
def mask_among_the_inputs(self, x, mask):
    y = torch.where(mask[:, None], self.a(x), x)
    return self.b(y.masked_fill(~mask[:, None], 0.5) * mask[:, None])


@form(
    lambda i: torch.full((4, 8), 10 + i, dtype=torch.uint8), lambda i: numbers(i).short(), lambda i: numbers(i).half()
)
def inputs_of_other_dtypes(self, x, image, short, half):
    return self.b(self.a(x) * (image / 255) + short[:, None] + half[:, None].float())


@form(numbers)
def integer_inputs(self, x, labels):
    return self.b(self.a(x) + self.table(labels) + (labels[:, None] % 3))


@form(lambda i: numbers(i).clamp(max=7))
def classes_as_unit_vectors(self, x, classes):
    y = self.a(x) + F.one_hot(classes, 8) + F.one_hot(num_classes=8, input=classes.view(2, 2)).flatten(0, 1)
    return self.b(y) + F.one_hot(y.argmax(1), num_classes=8)


@form(lambda i: torch.polar(torch.ones(4, 4), torch.arange(16.0).view(4, 4) * (i + 1)))
def complex_turns(self, x, turns):
    y = torch.view_as_real(torch.view_as_complex(self.a(x).reshape(4, 4, 2)) * turns).flatten(1)
    return self.b(y + torch.cat([turns.imag, turns.conj().imag], 1))


@form()
def fourier(self, x):
    return self.b(torch.fft.irfft(torch.fft.rfft(self.a(x)) * 2, n=8))


@form()
def parts_written(self, x):
    y = self.a(x)
    before = y + 1
    y[:, ::2] += x[:, ::2]
    y[:, 1:3].mul_(0.5).sigmoid_()
    y[1:, 4] = 0
    y[:, 5:].fill_(0.25)
    after = y.clone()
    y[:, :2].zero_()
    return self.b(y) + before * after


@form()
def masked_parts_written(self, x):
    y = self.a(x)
    y[y > 0] = 0
    y.scatter_add_(1, torch.tensor([[0, 3]] * 4), x[:, :2])
    return self.b(y)


@form()
def input_written(self, x):
    before = x * 2
    x += 1
    x[:, :3] = 0
    return self.a(x) + before


@form()
def constants_written(self, x):
    ones = torch.ones(4, 8)
    y = self.a(x) + ones
    ones[1] = 2
    y = y * ones
    ones += self.b(x)
    return y + ones


@form(numbers)
def mask_made_of_an_input(self, x, numbers):
    mask = torch.zeros(4, 8, dtype=torch.bool)
    mask[:, :4] = numbers[:, None] > 2
    mask[3] = True
    return self.b(self.a(x).masked_fill(mask, 0.5))


@form()
def derivative_inside(self, x):
    with torch.enable_grad():
        y = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(torch.tanh(self.a(y)).square().sum(), y)
    return self.b(gradient.detach())


@form(lambda i: torch.tensor(i))
def vector_for_all_rows(self, x, t):
    return x + self.a(F.silu(self.table(t)))


@form()
def fewer_keys_than_queries(self, x):
    q, k, v = self.a(x).view(1, 4, 4, 2), self.b(x)[:, :4].reshape(1, 4, 2, 2), self.b(x)[:, 4:].reshape(1, 4, 2, 2)
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).reshape(4, 8)


@form()
def patches_of_videos(self, x):
    y = torch.cat([self.a(x) * i for i in range(4)]).view(2, 2, 2, 2, 2, 2, 2)
    y = y.permute(0, 4, 1, 5, 2, 6, 3).reshape(4, 32)
    return self.b(y[:, ::4]) * torch.stack([y.abs().amax(1), y.square().mean(1)], 1).rsqrt().repeat(1, 4)


@form()
def view_changed_in_place(self, x):
    return self.b(self.a(x)[:, None].clone().squeeze_(1).t_().t_())


@form()
def zeros_around_vectors(self, x):
    return self.b(F.pad(self.a(x), (1, 0))[:, :8])


@form()
def zeros_around_channels(self, x):
    return self.b(F.pad(self.a(x).view(-1, 2, 4), (1, 0, 1, 0))[:, 1:, 1:].flatten(1))


EIGHT = torch.ones(8)


@form()
def shape_of_a_constant(self, x):
    return self.a(x) * EIGHT.shape.numel() + EIGHT.size().numel()


@form()
def parameters_listed(self, x):
    return self.a(x) * sum(p.numel() for p in self.parameters()) + sum(p.sum() for p in self.b.parameters())


@form()
def outputs_of_other_kinds(self, x):
    order = x.argmax(-1) + 2**30 + 1
    return {"y": self.a(x), "none": None, "count": 3, "name": "y", "order": order, "positive": x > 0, "x": x.double()}


def sequence_of(name, i):
    generator = torch.Generator().manual_seed(i)
    return (torch.randn(4, 8, generator=generator), *(make(i) for make in FORMS[name][1]))


@pytest.mark.parametrize("launched", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_it_has_a_plan_that_gives_what_the_members_give(name, launched, monkeypatch):
    monkeypatch.setattr(planned, "launches_on", lambda _: launched)
    torch.manual_seed(0)
    members = [Net(name) for _ in range(3)]
    ensemble = fastens.Ensemble(members)
    with torch.no_grad():
        for i in range(4):
            expected = [member(*sequence_of(name, i)) for member in members]
            given = sequence_of(name, i)
            found = ensemble(*given)
            assert all(torch.equal(a, b) for a, b in zip(given, sequence_of(name, i), strict=True))
            if name == "outputs_of_other_kinds":
                first = {**expected[0], "y": torch.stack([e["y"] for e in expected]).mean(0)}
                assert found["x"].dtype == torch.float64
                for key in ("order", "positive", "x"):
                    assert torch.equal(found[key], first[key])
                assert (found["none"], found["count"], found["name"]) == (None, 3, "y")
                found, expected = found["y"], [e["y"] for e in expected]
            assert relative_error(found, torch.stack(expected).mean(0)) < NETWORK[torch.float32]
    report = ensemble.report()
    if launched and name == "complex_turns":  # launches have no memory that is of two dtypes
        assert "another dtype" in report.why_no_plan
    else:
        assert len(report.plans) == 1, report.why_no_plan


def test_operations_of_torch_in_bfloat16_have_a_plan():
    torch.manual_seed(0)
    networks = [nn.Sequential(nn.Linear(8, 8), nn.LeakyReLU(0.1), nn.Linear(8, 8)) for _ in range(3)]
    members = [network.bfloat16() for network in networks]
    ensemble = fastens.Ensemble(members)
    with torch.no_grad():
        for i in range(3):
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(i)).bfloat16()
            expected = torch.stack([member(x) for member in members]).float().mean(0)
            assert relative_error(ensemble(x).float(), expected) < OP[torch.bfloat16]
    (plan,) = ensemble.report().plans
    assert plan["aten.leaky_relu.default"] == 1


@pytest.mark.parametrize("training", [False, True])
def test_nothing_that_needs_a_gradient_needs_no_grad(training):
    members = [nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.0)).requires_grad_(False) for _ in range(2)]
    ensemble = fastens.Ensemble([member.train(training) for member in members]).train(training)
    ensemble(torch.randn(4, 8))
    assert ensemble.report().plans, ensemble.report().why_no_plan


def hooked(network):
    network[0].register_forward_hook(_unchanged)
    return network


def _unchanged(module, args, output):
    return None


def reads(self, x):
    return self.a(x) if x.mean() > 0 else self.b(x)


@pytest.mark.parametrize(
    ("change", "call", "why"),
    [
        (hooked, lambda e, x: e(x), "forward hooks"),
        (lambda n: n, lambda e, x: e(x.requires_grad_()), "gradients are enabled"),
        (lambda n: n.train(), lambda e, x: e(x), "random"),
        (lambda n: n.double(), lambda e, x: e(x.double()), "float64"),
    ],
)
def test_a_refusal_has_a_reason(change, call, why):
    ensemble = fastens.Ensemble(
        [change(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)).requires_grad_(False).eval()) for _ in range(2)]
    )
    call(ensemble, torch.randn(4, 8))
    assert not ensemble.report().plans
    assert why in ensemble.report().why_no_plan


def test_too_few_rows_in_a_pass_are_a_reason():
    ensemble = fastens.Ensemble([nn.Linear(8, 8).requires_grad_(False) for _ in range(2)], max_fold=2)
    ensemble(torch.randn(4, 8))
    assert "max_fold=2" in ensemble.report().why_no_plan


def test_a_read_value_is_named_by_its_line():
    FORMS["reads"] = (reads, ())
    try:
        ensemble = fastens.Ensemble([Net("reads") for _ in range(2)])
        with torch.no_grad():
            ensemble(torch.randn(4, 8))
    finally:
        del FORMS["reads"]
    assert f"{__file__}:{reads.__code__.co_firstlineno + 1}" in ensemble.report().why_no_plan


def test_a_class_that_there_is_not_is_an_error_in_a_plan_too():
    torch.manual_seed(0)
    ensemble = fastens.Ensemble([Net("classes_as_unit_vectors") for _ in range(2)])
    with torch.no_grad():
        for _ in range(2):
            ensemble(*sequence_of("classes_as_unit_vectors", 0))
        assert len(ensemble.report().plans) == 1
        for wrong in (8, -1):
            with pytest.raises(RuntimeError, match=r"class|Class|out of bounds"):
                ensemble(torch.zeros(4, 8), torch.tensor([0, wrong, 1, 2]))


def test_a_trace_tells_complex_constants_apart():
    def traced(constant):
        x = torch.ones(2)
        recording, _ = record(lambda: x * constant, [x])
        return trace_of(recording)

    ones = torch.ones(2)
    assert traced(torch.complex(ones, ones)) == traced(torch.complex(ones, ones))
    assert traced(torch.complex(ones, ones)) != traced(torch.complex(ones, 2 * ones))
