"""What a network's Python asks torch for, and gradients of tensors that are no parameters: no plan hides either."""

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastens
from tests.networks import randomised
from tests.tolerances import relative_error

K, X = 3, torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
SILU = torch.ops.aten.silu.default


class Net(nn.Module):
    """A network that answers otherwise in a mode; frozen, so that it has plans with gradients enabled too."""

    def __init__(self, reads=lambda: False):
        super().__init__()
        self.first, self.second, self.reads = nn.Linear(4, 8), nn.Linear(8, 4), reads
        self.requires_grad_(False)

    def forward(self, x):
        h = nn.functional.silu(self.first(x))
        return self.second(h * 3 if self.reads() else h) + x


class Tripled(TorchDispatchMode):
    """A mode of a user's, which changes what an operation gives."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return result * 3 if func is SILU else result


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


MODES = {
    "gradients": (torch.enable_grad, torch.is_grad_enabled),
    "inference mode": (torch.inference_mode, torch.is_inference_mode_enabled),
    "deterministic algorithms": (deterministic, torch.are_deterministic_algorithms_enabled),
    "a mode that sees operations": (Tripled, lambda: False),
}


@pytest.mark.parametrize("weights", ["as they were", "written to"])
@pytest.mark.parametrize("calls", [1, 2, 4])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(("mode", "reads"), MODES.values(), ids=MODES)
def test_the_answer_is_that_of_members_in_that_mode(mode, reads, first, calls, weights):
    members = [randomised(lambda: Net(reads), seed) for seed in range(K)]
    ensemble = fastens.Ensemble([copy.deepcopy(member) for member in members])

    def check(inside):
        with torch.no_grad(), mode() if inside else contextlib.nullcontext():
            expected = torch.stack([member(X) for member in members]).mean(0)
            assert relative_error(ensemble(X), expected) < 1e-5

    for _ in range(calls):
        check(first)
    for _ in range(2):
        check(not first)
        check(first)
    if weights == "written to":
        with torch.no_grad():
            for p in (*ensemble.parameters(), *(p for member in members for p in member.parameters())):
                p.mul_(0.5)
    check(not first)
    check(first)


FACTOR = torch.ones(4)


class Holding(nn.Module):
    """A frozen network with tensors that are neither parameters nor buffers, such as prompts that are tuned."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4).requires_grad_(False)
        self.listed, self.attribute = [torch.ones(4)], torch.ones(4)
        closed = torch.ones(4)
        self.closure = lambda: closed

    def forward(self, x):
        return self.linear(x) * self.listed[0] * self.attribute * self.closure() * FACTOR


HELD = {
    "in a list": lambda network: network.listed[0],
    "an attribute": lambda network: network.attribute,
    "in a closure": lambda network: network.closure(),
    "a global": lambda network: FACTOR,
}


@pytest.mark.parametrize("calls", [0, 1, 3])
@pytest.mark.parametrize("held", HELD.values(), ids=HELD)
def test_gradients_of_a_tensor_that_is_no_parameter(held, calls):
    ensemble = fastens.Ensemble([randomised(Holding, seed) for seed in range(K)])
    for _ in range(calls):
        assert not ensemble(X).requires_grad
    tensor = held(ensemble.network).requires_grad_()
    try:
        for _ in range(2):
            (gradient,) = torch.autograd.grad(ensemble(X).sum(), tensor)
            with torch.no_grad():
                plain = torch.stack([member.linear(X) for member in ensemble.members]).mean(0)
            assert relative_error(gradient, plain.sum(0)) < 1e-5
    finally:
        tensor.requires_grad_(False)
    assert not ensemble(X).requires_grad
