"""What a network's code asks of its tensors beside their values, which a part of a stack would answer otherwise."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastens
from tests.fold.contract import made, near

X, T = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)), torch.tensor(3)

ASKED = {
    "is_leaf": lambda w: w.is_leaf,
    "grad_fn": lambda w: w.grad_fn is None,
    "_base": lambda w: w._base is None,
    "_base of a view": lambda w: w.view(-1)._base is w,
    "_is_view": lambda w: w._is_view(),
    "grad": lambda w: w.grad is None,
    "requires_grad": lambda w: w.requires_grad,
    "requires_grad_": lambda w: w.requires_grad and w.requires_grad_().is_leaf,
    "retains_grad": lambda w: (w.requires_grad and w.retain_grad(), w.retains_grad),
    "storage_offset": lambda w: (w.storage_offset(), w[1:].storage_offset()),
    "as_strided": lambda w: (w.as_strided((2,), (1,), 1).tolist(), torch.as_strided(w[1:], (2,), (1,), 0).tolist()),
    "as_strided_copy": lambda w: torch.as_strided_copy(w, (2,), (1,), storage_offset=1).tolist(),
    "as_strided_scatter": lambda w: torch.as_strided_scatter(w, torch.zeros(2), (2,), (1,), 1).tolist(),
    "repr": lambda w: ("Parameter" in repr(w), "grad_fn" in repr(w)),
    "class": lambda w: (type(w) is nn.Parameter, isinstance(w, nn.Parameter)),
    "deepcopy": lambda w: (copy.deepcopy(w).requires_grad, isinstance(copy.deepcopy(w), nn.Parameter)),
    "copy": lambda w: (copy.copy(w).requires_grad, copy.copy(w).is_leaf),
    "put back": lambda w: w.is_leaf,
    "of what follows": lambda w: ((w * 1).is_leaf, (w * 1).grad_fn is None, w.detach().is_leaf),
}


class Asks(nn.Module):
    """Answers by what it is told of a weight or a buffer."""

    def __init__(self, asks, of):
        super().__init__()
        self.asks, self.of = asks, of
        self.inner = nn.Linear(4, 4)
        self.register_buffer("scale", torch.rand(4))

    def forward(self, x, t):
        """Scale by the answer."""
        own = self.inner.weight if self.of == "weight" else self.scale
        if self.asks == "put back" and self.of == "weight":
            self.inner.weight = own
        return self.inner(x) * self.scale * (1 + sum(map(ord, repr(ASKED[self.asks](own)))))


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("of", ["weight", "buffer"])
@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("asks", ASKED)
def test_a_weight_answers_as_a_members_own(asks, engine, of, grad):
    members = [made(lambda _: Asks(asks, of), k) for k in range(3)]
    ensemble = fastens.Ensemble(members, engine=engine)
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = torch.stack([member(X, T) for member in copy.deepcopy(members)]).mean(0)
        for _ in range(3):
            near(ensemble(X, T), expected)


@pytest.mark.parametrize("engine", ["fold", "loop"])
@pytest.mark.parametrize("rows", [None, [0, 2]], ids=["all members", "assigned"])
@pytest.mark.parametrize("asks", ["is_leaf", "grad_fn"])
def test_passes_over_some_members_or_rows_answer_alike(asks, rows, engine):
    members = [made(lambda _: Asks(asks, "weight"), k) for k in range(3)]
    ensemble = fastens.Ensemble(members, engine=engine, max_fold=2)
    outputs = torch.stack([member(X, T) for member in members])
    for _ in range(3):
        if rows is None:
            near(ensemble(X, T), outputs.mean(0))
        else:
            with ensemble.assigned(rows):
                near(ensemble(X, T), outputs[rows, range(2)])
    assert ensemble.engine == engine


@pytest.mark.parametrize(("engine", "asks"), [("loop", "is_leaf"), ("loop", "_base"), ("fold", "is_leaf")])
def test_a_compiled_ensemble_answers_alike(asks, engine):
    members = [made(lambda _: Asks(asks, "weight"), k) for k in range(2)]
    compiled = torch.compile(fastens.Ensemble(members, engine=engine), backend="aot_eager")
    near(compiled(X, T), torch.stack([member(X, T) for member in members]).mean(0))


def test_gradients_are_each_members_own_in_a_loop():
    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x, t):
            grad = self.inner.weight.grad
            return self.inner(x) + (0 if grad is None else grad.sum())

    members = [made(lambda _: Looks(), k) for k in range(3)]
    ensemble = fastens.Ensemble(members, engine="loop")
    for k, member in enumerate(members):
        member.inner.weight.grad = torch.full((4, 4), float(k))
    near(ensemble(X, T), torch.stack([member(X, T) for member in copy.deepcopy(members)]).mean(0))
    (stack,) = (p for name, p in ensemble.named_parameters() if name.endswith("inner.weight"))
    stack.grad = torch.stack([member.inner.weight.grad for member in members])
    near(ensemble(X, T), torch.stack([member(X, T) for member in members]).mean(0))


def test_a_members_storage_is_told_to_be_of_all():
    ensemble = fastens.Ensemble([made(lambda _: Stored(), k) for k in range(2)], engine="loop")
    with pytest.warns(UserWarning, match="storage of a weight"):
        ensemble(X, T)


class Stored(nn.Module):
    """Looks at how large the storage of its weight is."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x, t):
        """Scale by it."""
        return self.inner(x) * self.inner.weight.untyped_storage().nbytes()


@pytest.mark.parametrize("engine", ["auto", "loop"])
def test_what_autograd_made_is_not_copied(engine):
    class Copies(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x, t):
            return copy.deepcopy(self.inner(x))

    ensemble = fastens.Ensemble([made(lambda _: Copies(), k) for k in range(2)], engine=engine)
    with pytest.raises(RuntimeError, match="deepcopy"):
        ensemble(X, T)
    with torch.no_grad():
        near(ensemble(X, T), torch.stack([member(X, T) for member in ensemble.members]).mean(0))


class Sets(nn.Module):
    """Gives a weight a gradient in its forward."""

    def __init__(self, value):
        super().__init__()
        self.inner, self.last, self.value = nn.Linear(4, 4), nn.Linear(4, 4), value

    def forward(self, x):
        """Two layers."""
        self.inner.weight.grad = None if self.value is None else torch.full((4, 4), self.value)
        return self.last(torch.tanh(self.inner(x)))


@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("value", [None, 2.0])
def test_a_gradient_that_a_member_sets_is_its_own(value, engine):
    """And is added to by the backward pass, whichever call it is."""
    members = [made(lambda _: Sets(value), k) for k in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ensemble = fastens.Ensemble(copy.deepcopy(members), engine=engine)
        for _ in range(3):
            ensemble(X).sum().backward()
            torch.stack([member(X) for member in members]).mean(0).sum().backward()
            for name, stack in ensemble.network.named_parameters():
                near(stack.grad, torch.stack([member.get_parameter(name).grad for member in members]))


class Checkpointed(nn.Module):
    """Asks of a weight inside an activation checkpoint."""

    def __init__(self, asks, reentrant):
        super().__init__()
        self.inner, self.last, self.asks, self.reentrant = nn.Linear(4, 4), nn.Linear(4, 4), asks, reentrant

    def block(self, h):
        weight = self.inner.weight
        h = torch.sin(nn.functional.linear(h, weight, self.inner.bias))
        return h * 2 if self.asks and weight.is_leaf else torch.cos(h)

    def forward(self, x):
        """Two layers."""
        return checkpoint(self.block, self.last(x), use_reentrant=self.reentrant)


@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("asks", [False, True])
def test_what_is_asked_in_a_checkpoint(asks, reentrant, engine):
    """The fold answers there; members one by one cannot, where backward runs their code again."""
    members = [made(lambda _: Checkpointed(asks, reentrant), k) for k in range(3)]
    ensemble = fastens.Ensemble(copy.deepcopy(members), engine=engine)
    for _ in range(2):
        found, expected = ensemble(X), torch.stack([member(X) for member in members]).mean(0)
        near(found, expected)
        if asks and engine == "loop":
            with pytest.raises(RuntimeError, match="switch its activation checkpoints off"):
                found.sum().backward()
            continue
        found.sum().backward()
        expected.sum().backward()
        for name, stack in ensemble.network.named_parameters():
            near(stack.grad, torch.stack([member.get_parameter(name).grad for member in members]))
