"""Tracers that record what is called: of an ensemble's own calls, plans and checks would be among it."""

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import fastens
from tests.fold.contract import K, averaged, made, near

X, Y = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
TRACERS = {
    "torch.jit.trace": lambda f, x: torch.jit.trace(f, (x,)),
    "make_fx": lambda f, x: make_fx(lambda x: f(x))(x),
    "make_fx, fake": lambda f, x: make_fx(lambda x: f(x), tracing_mode="fake", _allow_non_fake_inputs=True)(x),
    "make_fx, symbolic": lambda f, x: make_fx(lambda x: f(x), tracing_mode="symbolic", _allow_non_fake_inputs=True)(x),
}


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("called", [True, False], ids=["after calls", "before any call"])
@pytest.mark.parametrize("rule", ["mean", "alternating"])
@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("tracer", TRACERS)
def test_the_remedy_is_named_and_works(tracer, engine, rule, called, grad):
    members = [made(lambda _: nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 4)), k) for k in range(K)]
    ensemble = fastens.Ensemble(members, engine=engine, rule=rule)
    with torch.set_grad_enabled(grad):
        for _ in range(2 * called):
            ensemble(X)
        with pytest.raises(RuntimeError, match=r"does not see through an ensemble: .* torch\.export\.export"):
            TRACERS[tracer](ensemble, X)
        if rule == "mean":
            near(ensemble(Y), averaged([member(Y) for member in members]))
            graph = TRACERS[tracer](torch.export.export(ensemble, (X,)).module(), X)
            near(graph(Y), averaged([member(Y) for member in members]))


@pytest.mark.parametrize("engine", ["auto", "loop"])
def test_a_linearisation_names_the_derivative_that_works(engine):
    members = [made(lambda _: nn.Sequential(nn.Linear(4, 6), nn.SiLU()), k) for k in range(K)]
    ensemble, ones = fastens.Ensemble(members, engine=engine), torch.ones_like(X)
    with pytest.raises(RuntimeError, match=r"linearize does not see through an ensemble: call torch.func.jvp"):
        torch.func.linearize(ensemble, X)
    _, found = torch.func.jvp(ensemble, (X,), (ones,))
    near(found, averaged([torch.func.jvp(member, (X,), (ones,))[1] for member in members]))
