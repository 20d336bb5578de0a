"""Hooks that take themselves away when they are called: each member has its one call of them."""

from typing import Any

import pytest
import torch
from torch import nn

import fastens
from tests.tolerances import NETWORK, relative_error

K = 3
pytestmark = pytest.mark.filterwarnings("ignore:fastens. members are evaluated one by one")


def attached(network: Any, kind: str) -> None:
    def doubled(module, given, *_):
        handle.remove()
        return (given[0] * 2,)

    def moved(module, args, output):
        handle.remove()
        return output + 1

    register = {
        "forward": network[2].register_forward_hook,
        "pre": network[2].register_forward_pre_hook,
        "backward": network[2].register_full_backward_hook,
    }[kind]
    handle = register(moved if kind == "forward" else doubled)


class Once(nn.Module):
    """Has a method for a hook, and the handle in an attribute."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.handle = self.layer.register_forward_hook(self.first)

    def first(self, module, args, output):
        self.handle.remove()
        return output + 1

    def forward(self, x):
        return self.layer(x)


def made(make: Any = None) -> list[Any]:
    torch.manual_seed(0)
    make = make or (lambda: nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 4)))
    return [make().eval() for _ in range(K)]


def held(ensemble: Any, references: Any, grad: bool) -> None:
    for rows in (3, 3, 2):
        x: Any = torch.randn(rows, 4, requires_grad=grad)
        given: Any = x.detach().clone().requires_grad_(grad)
        with torch.set_grad_enabled(grad):
            found, expected = ensemble(x), torch.stack([each(given) for each in references]).mean(0)
        assert relative_error(found, expected) < NETWORK[torch.float32]
        if grad:
            found.sum().backward()
            expected.sum().backward()
            assert relative_error(x.grad, given.grad) < NETWORK[torch.float32]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("engine", ["auto", "fold", "loop"])
@pytest.mark.parametrize("kind", ["forward", "pre", "backward"])
@pytest.mark.parametrize("when", ["before", "after", "after a call"])
def test_each_is_called_once(when, kind, engine, grad):
    members, references = made(), made()
    for each in (*references, *(members if when == "before" else ())):
        attached(each, kind)
    ensemble = fastens.Ensemble(members, engine="auto" if when == "before" else engine)
    if when == "after a call":
        with torch.set_grad_enabled(grad):
            ensemble(torch.randn(3, 4))
    if when != "before":
        attached(ensemble.network, kind)
    held(ensemble, references, grad)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("engine", ["auto", "loop"])
def test_handles_in_attributes(engine, grad):
    held(fastens.Ensemble(made(Once), engine=engine), made(Once), grad)
