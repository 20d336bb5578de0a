"""What members return beside scores: values alike as they are, values that differ named, tensors stacked on demand."""

import math

import pytest
import torch
from torch import Tensor, nn

import fastens

X, T = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.rand(4)


class Network(nn.Module):
    def __init__(self, beside):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.beside = beside

    def forward(self, x, t):
        h = self.layer(x)
        return {"scores": h, "beside": self.beside(self, h)}


def ensemble(beside, engine="auto", k=3):
    torch.manual_seed(k)
    members = [Network(beside) for _ in range(k)]
    with torch.no_grad():
        return members, fastens.Ensemble(members, engine=engine)


DIFFERENT = {
    "float": lambda self, h: float(self.layer.weight.sum()),
    "complex": lambda self, h: complex(float(self.layer.weight.sum()), 1.0),
    "int": lambda self, h: int(1e4 * float(self.layer.weight.sum())),
    "bool in a list": lambda self, h: [float(p) > 0 for p in self.layer.weight.flatten()],
    "str": lambda self, h: str(float(self.layer.bias.sum())),
    "within": lambda self, h: {"a": [1, (float(h.detach().sum()),)]},
}
ALIKE = {
    "None": lambda self, h: None,
    "number": lambda self, h: 3,
    "nan": lambda self, h: float("nan"),
    "shape": lambda self, h: h.shape,
    "size": lambda self, h: {"rows": h.shape[0], "name": "head"},
    "dtype": lambda self, h: (h.dtype, h.device, slice(1, 2)),
}
TENSORS = {
    "complex": lambda self, h: torch.complex(h, h),
    "int": lambda self, h: (h * 1e4).long(),
    "bool": lambda self, h: h > 0,
    "bool alike": lambda self, h: h == h,
    "common": lambda self, h: torch.arange(5),
}
HIDDEN = {
    "closure": lambda self, h: lambda: h,
    "generator": lambda self, h: (row for row in h),
    "set": lambda self, h: {h},
    "object": lambda self, h: self,
}


@pytest.mark.filterwarnings("ignore:fastens. members are evaluated one by one")
@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("call", ["__call__", "member_outputs"])
@pytest.mark.parametrize("kind", DIFFERENT)
def test_values_that_differ_are_named(kind, call, engine):
    """One member's value is no answer of the ensemble's."""
    _, made = ensemble(DIFFERENT[kind], engine)
    with torch.no_grad():
        for _ in range(3):
            with pytest.raises(TypeError, match=r"members return .* and .*: a rule combines floating-point tensors"):
                getattr(made, call)(X, T)


@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("kind", ALIKE)
def test_values_alike_are_returned(kind, k, engine):
    members, made = ensemble(ALIKE[kind], engine, k)
    with torch.no_grad():
        expected = members[0](X, T)["beside"]
        for call in (made, made, made.member_outputs):
            given = call(X, T)["beside"]
            assert given == expected or repr(given) == repr(expected)
    assert kind != "nan" or math.isnan(given)


@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("kind", TENSORS)
def test_every_tensor_is_stacked(kind, k, engine):
    members, made = ensemble(TENSORS[kind], engine, k)
    with torch.no_grad():
        expected = torch.stack([member(X, T)["beside"] for member in members])
        for _ in range(3):
            given = made.member_outputs(X, T)["beside"]
            assert given.dtype == expected.dtype
            torch.testing.assert_close(given, expected)
        if k == 1 or all(torch.equal(expected[0], other) for other in expected):
            torch.testing.assert_close(made(X, T)["beside"], expected[0])
        else:
            with pytest.raises(TypeError, match=r"member_outputs\(\.\.\.\) stacks them"):
                made(X, T)


@pytest.mark.filterwarnings("ignore:fastens. members are evaluated one by one")
@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("kind", HIDDEN)
def test_what_may_hide_tensors_is_refused(kind, engine):
    _, made = ensemble(HIDDEN[kind], engine)
    with torch.no_grad(), pytest.raises(TypeError, match="whose tensors the ensemble does not know"):
        made(X, T)


def test_a_tensor_beside_scores_keeps_its_gradient():
    members, made = ensemble(lambda self, h: torch.complex(h, 2 * h))
    stack: Tensor = made.member_outputs(X, T)["beside"]
    stack.imag.sum().backward()
    for k, member in enumerate(members):
        member(X, T)["beside"].imag.sum().backward()
        torch.testing.assert_close(dict(made.named_parameters())["network.layer.bias"].grad[k], member.layer.bias.grad)


@pytest.mark.filterwarnings("ignore:fastens. members are evaluated one by one")
@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("kind", DIFFERENT)
def test_values_that_differ_are_named_where_rows_have_members(kind, engine):
    _, made = ensemble(DIFFERENT[kind], engine)
    with torch.no_grad(), made.assigned(torch.tensor([0, 2, 1, 1])):
        for _ in range(3):
            with pytest.raises(TypeError, match="members return"):
                made(X, T)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("kind", ALIKE)
def test_values_alike_are_returned_where_rows_have_members(kind, engine, deterministic):
    members, made = ensemble(ALIKE[kind], engine)
    expected = members[0](X, T)["beside"]
    if deterministic and kind in ("shape", "size"):
        with torch.no_grad(), fastens.deterministic(True), pytest.raises(fastens.reproducible.NotReproducible):
            made(X, T)
        return
    with torch.no_grad(), made.assigned(torch.tensor([0, 2, 1, 1])), fastens.deterministic(deterministic):
        for _ in range(3):
            given = made(X, T)["beside"]
            assert given == expected or repr(given) == repr(expected)


@pytest.mark.parametrize("engine", ["auto", "loop"])
def test_structures_that_differ_are_named(engine):
    made = fastens.Ensemble([Network(lambda self, h, name=name: {name: h}) for name in "ab"], engine=engine)
    with torch.no_grad(), pytest.raises(TypeError, match="different structure"):
        made(X, T)
    with torch.no_grad(), made.assigned(torch.tensor([0, 1, 1, 0])), pytest.raises(TypeError, match="structure"):
        made(X, T)


KEPT = {
    "a weight": lambda self, h: self.layer.weight,
    "a buffer": lambda self, h: self.table,
    "whole numbers": lambda self, h: self.steps,
    "a tensor that is no buffer": lambda self, h: self.held,
    "a part": lambda self, h: self.table[1:],
    "the argument": lambda self, h: self.given,
}


class Keeping(Network):
    """A network that returns what it keeps, and computes with it."""

    def __init__(self, beside):
        super().__init__(beside)
        self.register_buffer("table", torch.arange(1.0, 4.0))
        self.register_buffer("steps", torch.arange(3))
        self.held = torch.ones(3)

    def forward(self, x, t):
        h = self.layer(x) * self.table * self.steps * self.held
        return {"scores": h, "beside": x if self.beside is KEPT["the argument"] else self.beside(self, h)}


@pytest.mark.filterwarnings("ignore:fastens. members are evaluated one by one")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("kind", KEPT)
def test_what_is_returned_is_the_callers_to_write_to(kind, k, engine, grad):
    members = [Keeping(KEPT[kind]) for _ in range(k)]
    made, x = fastens.Ensemble(members, engine=engine), X.clone()
    with torch.set_grad_enabled(grad):
        expected = torch.stack([member(x, T)["scores"] for member in members])
        for call in (made, made.member_outputs) * 4:
            call(x, T)["beside"].detach().add_(7)
            torch.testing.assert_close(made.member_outputs(x, T)["scores"], expected)
            torch.testing.assert_close(x, X)
