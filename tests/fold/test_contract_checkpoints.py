"""Checkpoints (``torch.utils.checkpoint``) inside a network and around the ensemble."""

import functools
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

import fastens
from fastens.training import member_forward
from tests.fold.contract import Held, K, averaged, gradients_of, made, near
from tests.fold.test_contract_transforms import VECTORS, Network


class Checkpointed(nn.Module):
    """Checkpoints a part of itself, with a weight that is read or not."""

    def __init__(self, reentrant, reads, how="function"):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm, self.gain = nn.LayerNorm(4), nn.Parameter(torch.zeros(4))
        self.reentrant, self.reads, self.how = reentrant, reads, how

    def part(self, h, shift):
        h = self.norm(torch.tanh(self.second(h))) * self.gain
        return (h * float(self.gain.detach()[0]) if self.reads else h) + shift

    def forward(self, x):
        h = self.first(x)
        if self.how == "sequence":
            return checkpoint_sequential([self.second, self.norm, nn.Tanh()], 2, h, use_reentrant=self.reentrant)
        return checkpoint(self.part, h, x, use_reentrant=self.reentrant)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("engine", ["auto", "fold", "loop"])
@pytest.mark.parametrize("reads", [False, True], ids=["folded", "reads"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("how", ["function", "sequence"])
def test_checkpoints_inside_a_network(how, reentrant, reads, engine):
    held = Held(lambda k: Checkpointed(reentrant, reads, how), engine=engine)
    for _ in range(2):
        held.gradients(VECTORS)
    held.everywhere(VECTORS)


class Nested(nn.Module):
    """Checkpoints a part that checkpoints a part."""

    def __init__(self, outer, inner):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.outer, self.inner = outer, inner

    def part(self, h):
        return torch.tanh(self.second(checkpoint(self.first, h, use_reentrant=self.inner).sin() + h))

    def forward(self, x):
        return checkpoint(self.part, x + self.second.bias, use_reentrant=self.outer)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("outer", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("inner", [False, True], ids=["", "reentrant"])
def test_checkpoints_inside_checkpoints(outer, inner):
    held = Held(lambda k: Nested(outer, inner))
    for _ in range(3):
        held.gradients(VECTORS)
    held.everywhere(VECTORS)
    assert outer or inner or held.ensemble.engine == "fold"


class Rescaled(nn.Module):
    """Begins its checkpoint with parameters alone, and with what all members share."""

    def __init__(self):
        super().__init__()
        self.inner, self.gain = nn.Linear(4, 4), nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return checkpoint(lambda x: self.gain.tanh() * self.inner(x) * self.inner.weight.sum(), x, use_reentrant=False)


@pytest.mark.parametrize("make", [lambda: Network(mixes=False), Rescaled, lambda: Nested(False, False)])
@pytest.mark.parametrize("around", [False, True], ids=["", "around"])
@pytest.mark.parametrize("how", ["some members", "rows"])
def test_checkpoints_in_a_pass_of_some_members_or_rows(how, around, make):
    held = Held(lambda k: make(), max_fold=5 if how == "some members" else None)
    ensemble, x = held.ensemble, torch.randn(4, 4)
    scope = ensemble.assigned([0, 1, 2, 1]) if how == "rows" else nullcontext()
    with scope:
        found = held.quietly(lambda: checkpoint(ensemble, x, use_reentrant=False) if around else ensemble(x))
        found.sum().backward()
    assert ensemble.engine == "fold"
    assert not held.warned
    theirs = [m(x) for m in held.members]
    expected = torch.stack([theirs[k][i] for i, k in enumerate([0, 1, 2, 1])]) if how == "rows" else averaged(theirs)
    near(found, expected)
    expected.sum().backward()
    for name, _ in held.members[0].named_parameters():
        own = torch.stack([dict(m.named_parameters())[name].grad for m in held.members])
        near(gradients_of(ensemble)[name], own, 1e-4)


DRAWS = {
    "of a shape": lambda h: torch.rand(h.shape),
    "like what is common": lambda h: torch.randn_like(torch.empty(h.shape)),
    "into what is common": lambda h: torch.zeros(h.shape).normal_(),
    "like a member's": torch.randn_like,
    "of whole numbers": lambda h: torch.randint(1, 5, (4,)),
    "a permutation": lambda h: h[:, torch.randperm(4)],
    "a mask": lambda h: torch.nn.functional.dropout(torch.ones(h.shape)),
    "a sum in place": lambda h: torch.zeros(h.shape).add_(h),
}


class Drawing(nn.Module):
    """Draws random numbers in checkpoints, one inside another, or without any."""

    def __init__(self, draw, checkpoints):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.dropout, self.draw, self.checkpoints = nn.Dropout(0.4), draw, checkpoints

    def run(self, part, *args):
        return checkpoint(part, *args, use_reentrant=False) if self.checkpoints else part(*args)

    def inner(self, h):
        h = self.dropout(self.second(h))
        return torch.tanh(h * self.draw(h))

    def outer(self, x):
        return self.run(self.inner, self.first(x)).sin() + self.draw(x)

    def forward(self, x):
        return self.run(self.inner, self.inner(self.run(self.outer, x)))


def derivatives(ensemble, of):
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    for seed in (0, 1):  # the first call is checked, and draws for that
        torch.manual_seed(seed)
        found = ensemble(x)
    torch.rand(7)
    return found, torch.autograd.grad(found.square().sum(), [x, *of])


@pytest.mark.parametrize("how", ["whole", "some members", "rows"])
@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_random_numbers_in_checkpoints_are_the_same_again(draw, how):
    found = []
    for checkpoints in (False, True):
        members = [made(lambda _, c=checkpoints: Drawing(draw, c), k).train() for k in range(K)]
        ensemble = fastens.Ensemble(members, max_fold=5 if how == "some members" else None).train()
        with ensemble.assigned([0, 1, 2, 1, 0]) if how == "rows" else nullcontext():
            found.append(derivatives(ensemble, ensemble.parameters()))
        assert ensemble.engine == "fold"
    near(found[1], found[0])


@pytest.mark.parametrize("masks", ["fixed", "fresh"])
@pytest.mark.parametrize("engine", ["fold", "loop"])
def test_dropout_masks_in_checkpoints_are_the_same_again(engine, masks):
    found = []
    for checkpoints in (False, True):
        network = made(lambda _, c=checkpoints: Drawing(torch.ones_like, c), 0)
        ensemble = fastens.MCDropout(network, K, masks=masks, engine=engine)
        with ensemble.trajectory(5, 0):
            found.append(derivatives(ensemble, ensemble.parameters()))
    near(found[1], found[0])
    assert float(found[0][0].detach().std()) > 0


@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_a_checkpoint_around_the_ensemble(reentrant, engine):
    held = Held(lambda k: Network(), engine=engine)
    x = torch.randn(5, 4, requires_grad=True)
    held.sampling(VECTORS)
    for p in held.ensemble.parameters():
        p.grad = None
    found = checkpoint(held.ensemble, x, use_reentrant=reentrant)
    near(found, averaged(held.loop(x)))
    found.sum().backward()
    averaged([m(x.detach()) for m in held.members]).sum().backward()
    for name, _ in held.members[0].named_parameters():
        theirs = torch.stack([dict(m.named_parameters())[name].grad for m in held.members])
        near(gradients_of(held.ensemble)[name], theirs, 1e-4)


_SAVED = {"tanh", "mul", "add", "addmm", "bmm", "baddbmm", "mm", "native_layer_norm"}


_VIEWS = {"select", "slice", "alias", "view", "detach", "unbind", "t", "transpose", "clone", "expand", "_unsafe_view"}


def selected(saved, context, op, *args, **kwargs):
    """Keep results of some operations, which the second run takes by their order."""
    kept = op.name().split("::")[-1].split(".")[0] in saved
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def keeping(saved):
    return functools.partial(create_selective_checkpoint_contexts, functools.partial(selected, saved))


class KeepsViews(nn.Module):
    """Checkpoints a part that takes its weights apart, one of which it has read before, and keeps what it takes."""

    def __init__(self, reads):
        super().__init__()
        self.first, self.second, self.reads = nn.Linear(4, 4), nn.Linear(4, 4), reads

    def part(self, h):
        h = torch.tanh(self.second(h + h.select(1, 1)[:, None] * h[:, 1:2]))
        h = h * self.first.weight.select(0, 1) + self.second.bias[2]
        return -h if self.reads and bool(self.second.bias.detach()[0] > 0) else h

    def forward(self, x):
        h = x + self.second.weight.sum()
        return checkpoint(self.part, h, use_reentrant=False, context_fn=keeping(_VIEWS)) + self.first(x)


@pytest.mark.parametrize("engine", ["auto", "fold", "loop"])
@pytest.mark.parametrize("reads", [False, True], ids=["folded", "reads"])
def test_what_members_take_of_their_weights_is_no_operation_of_theirs(engine, reads):
    held = Held(lambda k: KeepsViews(reads), engine=engine)
    for _ in range(2):
        held.gradients(VECTORS)
    held.everywhere(VECTORS)


class OfRows(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x):
        return self.last(torch.tanh(self.norm(self.first(x))) * x)


@pytest.mark.parametrize("engine", ["fold", "loop"])
@pytest.mark.parametrize("way", ["rule", "own rows", "assigned"])
@pytest.mark.parametrize("saved", [_SAVED, _VIEWS], ids=["results", "views"])
def test_a_selective_checkpoint_around_the_ensemble(saved, way, engine):
    held = Held(lambda k: OfRows(), engine=engine)
    x, rows = torch.randn(K, 5, 4), torch.arange(5) % K

    def ours(x):
        if way == "own rows":
            return member_forward(held.ensemble, x)
        with held.ensemble.assigned(rows.tolist()) if way == "assigned" else nullcontext():
            return held.ensemble(x[0])

    def theirs(x):
        found = torch.stack([member(x[k] if way == "own rows" else x[0]) for k, member in enumerate(held.members)])
        return {"rule": found.mean(0), "own rows": found, "assigned": found[rows, torch.arange(5)]}[way]

    for _ in range(2):  # the first call of its kind computes more than the second run of it
        a, b = (x.clone().requires_grad_() for _ in range(2))
        for each in (held.ensemble, *held.members):
            each.zero_grad()
        found, expected = checkpoint(ours, a, use_reentrant=False, context_fn=keeping(saved)), theirs(b)
        near(found, expected)
        found.square().sum().backward()
        expected.square().sum().backward()
        near(a.grad, b.grad, 1e-4)
        for name, _ in held.members[0].named_parameters():
            parts = torch.stack([dict(m.named_parameters())[name].grad for m in held.members])
            near(gradients_of(held.ensemble)[name], parts, 1e-4)


class Reading(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * x.cos() if float(x.sum()) else grad


class Unfoldable(nn.Module):
    """Saves tensors, and then does what no pass of all members can, from some call on."""

    def __init__(self, what, since):
        super().__init__()
        self.first, self.what, self.since = nn.Linear(4, 4), what, since

    def forward(self, x, t=0):
        h = torch.tanh(self.first(x)) * 2
        if t < self.since:
            return h
        if self.what == "function":
            return Reading.apply(h)
        if self.what == "type" and type(h) is not torch.Tensor:
            raise AttributeError("no wrapper")
        return h * float(self.first.bias.detach()[0])


@pytest.mark.parametrize("rows", [False, True], ids=["all", "rows"])
@pytest.mark.parametrize("since", [0, 1], ids=["at first", "later"])
@pytest.mark.parametrize("what", ["function", "type", "value"])
def test_a_checkpoint_around_a_call_whose_fold_fails(what, since, rows):
    held = Held(lambda k: Unfoldable(what, since), 2)
    x = torch.randn(2, 4, requires_grad=True)
    for t in range(since + 1):
        with held.ensemble.assigned([1, 0]) if rows else nullcontext():
            found = held.quietly(lambda t=t: checkpoint(held.ensemble, x, t, use_reentrant=False))
            ours = torch.autograd.grad(found.square().sum(), x)
        theirs = held.loop(x, t)
        expected = torch.stack([theirs[1][0], theirs[0][1]]) if rows else averaged(theirs)
        near(found, expected)
        near(ours, torch.autograd.grad(expected.square().sum(), x))
    rows_alone = rows and what == "value"  # that Python reads of rows says nothing of other calls
    assert held.ensemble.engine == ("fold" if rows_alone else "loop")
