"""What members' code does to their weights beside computing with them: freezes, hooks, gradients; in any call."""

import copy

import pytest
import torch
from torch import nn

import fastens
from tests.fold.contract import K, made, near

pytestmark = pytest.mark.filterwarnings("ignore:fastens")
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Acts(nn.Module):
    """Does something to a weight in its calls from a number on, unless another call is said."""

    def __init__(self, act, begin, every):
        super().__init__()
        self.first, self.last, self.calls, self.seen = nn.Linear(4, 4), nn.Linear(4, 4), 0, []
        self.act, self.begin, self.every = act, begin, every

    def forward(self, x):
        """Two layers."""
        self.calls += 1
        weight, h = self.first.weight, x
        if self.calls == self.begin or (self.every and self.calls > self.begin):
            h = self.act(self, weight, h)
        return self.last(torch.tanh(nn.functional.linear(h, weight, self.first.bias)))


def freezes(member, weight, h):
    weight.requires_grad_(False)
    return h


def freezes_by_attribute(member, weight, h):
    weight.requires_grad = False
    return h


def freezes_for_a_while(member, weight, h):
    weight.requires_grad = False
    h = torch.sin(nn.functional.linear(h, weight))
    weight.requires_grad = True
    return h


def freezes_the_layer(member, weight, h):
    member.first.requires_grad_(False)
    h = torch.sin(nn.functional.linear(h, weight) + member.first(h))
    member.first.requires_grad_(True)
    return h + nn.functional.linear(h, weight)


def hooks(member, weight, h):
    weight.register_hook(lambda grad: grad.clamp(-0.1, 0.1))
    return h


def hooks_and_removes(member, weight, h):
    member.seen.append(weight.register_hook(lambda grad: 2 * grad))
    if len(member.seen) > 1:
        member.seen.pop(0).remove()
    return h


def retains(member, weight, h):
    weight.retain_grad()
    return h


def has_no_gradient(member, weight, h):
    weight.grad = None
    return h * (2 if weight.grad is None else 3)


def has_none_of_all(member, weight, h):
    member.zero_grad()
    return h


def halves_its_gradient(member, weight, h):
    return h if weight.grad is None else h + weight.grad.mul_(0.5).sum()


def scales_itself(member, weight, h):
    with torch.no_grad():
        member.first.weight.mul_(0.9)
    grad, leaf = member.first.weight.grad, member.first.weight.is_leaf
    return h * (2 if leaf else 3) if grad is None else h + grad.sum()


ACTS = [
    freezes, freezes_by_attribute, freezes_for_a_while, freezes_the_layer, hooks, hooks_and_removes, retains,
    has_no_gradient, has_none_of_all, halves_its_gradient, scales_itself,
]  # fmt: skip


def same_gradients(ensemble, members):
    """Gradients of the stacks are the members'; none where no member has one."""
    stacks = dict(ensemble.network.named_parameters())
    for name, own in members[0].named_parameters():
        grads = [member.get_parameter(name).grad for member in members]
        if all(grad is None for grad in grads):
            assert stacks[name].grad is None, name
        else:
            near(stacks[name].grad, torch.stack([torch.zeros_like(own) if g is None else g for g in grads]))


@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize(("begin", "every"), [(1, True), (1, False), (3, False)], ids=["all", "first", "third"])
@pytest.mark.parametrize("act", ACTS, ids=lambda act: act.__name__)
def test_what_a_call_does_is_done_to_the_members_own(act, begin, every, engine):
    members = [made(lambda _: Acts(act, begin, every), k) for k in range(K)]
    ensemble = fastens.Ensemble(copy.deepcopy(members), engine=engine)
    for _ in range(5):
        found, expected = ensemble(X), torch.stack([member(X) for member in members]).mean(0)
        near(found, expected)
        found.sum().backward()
        expected.sum().backward()
        same_gradients(ensemble, members)


def test_a_hook_is_called_once_in_a_pass_and_only_of_members_that_it_reaches():
    members = [made(lambda _: Acts(hooks_that_count, 1, False), k) for k in range(K)]
    ensemble = fastens.Ensemble(copy.deepcopy(members), engine="loop")
    (ensemble(X) + ensemble(2 * X)).sum().backward()
    with ensemble.assigned([0, 0, 2]):
        ensemble(X).sum().backward()
    torch.stack([member(X) + member(2 * X) for member in members]).mean(0).sum().backward()
    (members[0](X[:2]).sum() + members[2](X[2:]).sum()).backward()
    same_gradients(ensemble, members)


def hooks_that_count(member, weight, h):
    weight.register_hook(lambda grad: grad.clamp(-0.1, 0.1) + 1)
    return h


def test_hooks_that_run_after_accumulation_are_an_error():
    def act(member, weight, h):
        weight.register_post_accumulate_grad_hook(lambda p: None)
        return h

    ensemble = fastens.Ensemble([made(lambda _: Acts(act, 1, False), k) for k in range(K)], engine="loop")
    with pytest.raises(RuntimeError, match="register it on the ensemble's parameter"):
        ensemble(X)


def test_members_that_freeze_what_others_train_are_an_error():
    def act(member, weight, h):
        return freezes(member, weight, h) if member.mark > 0 else h

    members = [made(lambda _: Acts(act, 1, False), k) for k in range(K)]
    for k, member in enumerate(members):
        member.register_buffer("mark", torch.tensor(float(k - 1)))
    ensemble = fastens.Ensemble(members, engine="loop")
    with pytest.raises(ValueError, match="freeze it in all of them, or in none"):
        ensemble(X)
    assert all(p.requires_grad for p in ensemble.parameters())


class Attends(nn.Module):
    """Layers of attention, of which torch has fast paths, and a count that keeps members from being folded."""

    def __init__(self):
        super().__init__()
        self.inner, self.calls = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2), 0

    def forward(self, x, mask):
        """Attend where nothing is padding."""
        self.calls += 1
        return self.inner(x, src_key_padding_mask=mask)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("grad", [False, True])
def test_members_take_the_paths_of_torch_that_they_take_alone(grad, engine):
    """Where a mask pads, the fast one gives zeros."""
    members = [made(lambda _: Attends(), k) for k in range(K)]
    ensemble = fastens.Ensemble(copy.deepcopy(members), engine=engine)
    x, mask = torch.randn(2, 5, 8), torch.arange(5) >= torch.tensor([5, 3])[:, None]
    with torch.set_grad_enabled(grad):
        for _ in range(3):
            near(ensemble(x, mask), torch.stack([member(x, mask) for member in members]).mean(0))


class Breaks(nn.Module):
    """Writes to itself, and raises in one call of one member."""

    def __init__(self, fails):
        super().__init__()
        self.layer, self.calls, self.past = nn.Linear(4, 4), 0, []
        self.register_buffer("fails", torch.tensor(float(fails)))
        self.register_buffer("average", torch.zeros(4))

    def forward(self, x):
        """One layer."""
        self.calls += 1
        self.past.append(self.calls)
        with torch.no_grad():
            self.layer.bias.mul_(0.9)
            self.average.add_(1)
        self.average = self.average * 1.1
        if self.calls == 2 and self.fails:
            raise KeyError("the second call")
        return self.layer(x) * sum(self.past) + self.average


@pytest.mark.parametrize("engine", ["auto", "loop"])
def test_what_members_did_before_an_error_of_theirs_they_have_done(engine):
    members = [made(lambda k: Breaks(k == 1), k) for k in range(K)]
    ensemble = fastens.Ensemble(copy.deepcopy(members), engine=engine)
    for call in range(4):
        if call == 1:
            with pytest.raises(KeyError):
                ensemble(X)
            with pytest.raises(KeyError):
                [member(X) for member in members]
        else:
            near(ensemble(X), torch.stack([member(X) for member in members]).mean(0))
        for mine, theirs in zip(ensemble.members, members, strict=True):
            assert (mine.calls, mine.past) == (theirs.calls, theirs.past)
            near(mine.state_dict(), theirs.state_dict())
