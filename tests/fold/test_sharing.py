"""What is a view in one layout and a copy in another: a write to it changes what it changes in the members."""

import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.fold.contract import Held, near

LAST = torch.channels_last


def image(net, x):
    return F.conv2d(x, net.k, padding=1)


def image_last(net, x):
    return F.conv2d(x.contiguous(memory_format=LAST), net.k, padding=1)


def scores(net, x):
    return torch.einsum("bchw,hv->bwcv", x, net.w)


def half(net, x):
    return image(net, x)[1:]


MADE = {"image": image, "image, channels last": image_last, "product": scores, "half of the rows": half}
SEEN = {
    "viewed": lambda h: h.view(len(h), -1) if h.is_contiguous() else h.transpose(1, 3).transpose(1, 3),
    "flattened": lambda h: h.flatten(1),
    "contiguous": torch.Tensor.contiguous,
    "channels last": lambda h: h.to(memory_format=LAST),
    "tokens": lambda h: h.flatten(2).transpose(1, 2).contiguous(),
}


class Writes(nn.Module):
    """Writes to a tensor, or to what is made of it, what is there unless the input is large."""

    def __init__(self, made, seen, first):
        super().__init__()
        self.made, self.seen, self.first = made, seen, first
        self.k, self.w = nn.Parameter(torch.zeros(4, 4, 3, 3)), nn.Parameter(torch.zeros(6, 6))
        self.s = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        h = self.made(self, x)
        seen = self.seen(h)
        (h if self.first else seen).clamp_(-5, 5)
        return (seen if self.first else h) * self.s


def small_then_large(generator):
    return (torch.randn(2, 4, 6, 6, generator=generator) * (0.1 if generator.initial_seed() < 2 else 30),)


@pytest.mark.parametrize("first", [False, True], ids=["the second is written to", "the first is written to"])
@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize("made", MADE)
def test_writes_reach_what_they_reach_in_members(made, seen, first):
    held = Held(lambda _: Writes(MADE[made], SEEN[seen], first))
    held.sampling(small_then_large)
    for seed in (0, 2):  # without plans
        held.call(*small_then_large(torch.Generator().manual_seed(seed)))


class Late(Writes):
    """Writes to what a member has a view of beforehand."""

    def forward(self, x):
        h = self.made(self, x).clamp_(-5, 5)
        return self.seen(h) * self.s


@pytest.mark.parametrize("made", MADE)
def test_a_write_before_it_costs_no_plan(made):
    held = Held(lambda _: Late(MADE[made], SEEN["flattened"], True))
    held.sampling(small_then_large)
    assert not held.ensemble.report().why_no_plan
    assert not held.warned


class Dropped(Writes):
    """Writes to what is made of a tensor that nobody has any more, as layers in a row do that work in place."""

    def forward(self, x):
        return self.seen(self.made(self, x)).clamp_(-5, 5) * self.s


LEFT = {
    "a part": lambda h: h[:1],
    "a row": lambda h: next(iter(h)),
    "a chunk": lambda h: h.chunk(2)[0],
    "another shape": lambda h: h.unsqueeze(0),
    "the same": lambda h: h,
    "detached": torch.Tensor.detach,
    "in an object": lambda h: types.SimpleNamespace(h=h),
    "of a function": lambda h: Same.apply(h),
    "to be called": lambda h: h.mean,
}


REFUSED = [LEFT[name] for name in ("a row", "a chunk", "of a function")]  # by torch, to members that differentiate them


class Same(torch.autograd.Function):
    """A view, by a function of the user's."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return g


class Cut(Writes):
    """The same, where somebody has something of it left."""

    def __init__(self, made, seen, left):
        super().__init__(made, seen, False)
        self.left = left

    def forward(self, x):
        h = self.made(self, x)
        left, seen = self.left(h), self.seen(h)
        del h
        seen.clamp_(-5, 5)
        left = getattr(left, "h", left)
        return (left() if callable(left) else left) * self.s


@pytest.mark.parametrize("seen", [name for name in SEEN if name != "viewed"])  # where a layout is read
@pytest.mark.parametrize("made", ["image", "image, channels last", "product"])
def test_what_nobody_has_any_more_costs_no_plan(made, seen):
    held = Held(lambda _: Dropped(MADE[made], SEEN[seen], False))
    held.sampling(small_then_large)
    assert not held.ensemble.report().why_no_plan
    assert not held.warned


@pytest.mark.parametrize("left", LEFT.values(), ids=LEFT)
@pytest.mark.parametrize("seen", ["flattened", "contiguous", "tokens"])
@pytest.mark.parametrize("made", MADE)
def test_what_somebody_has_left_is_seen(made, seen, left):
    held = Held(lambda _: Cut(MADE[made], SEEN[seen], left))
    held.sampling(small_then_large)
    if left not in REFUSED:
        for seed in (0, 2):  # without plans
            held.call(*small_then_large(torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("training", [False, True])
def test_layers_in_a_row_that_work_in_place(training):
    held = Held(lambda _: nn.Sequential(nn.Conv2d(4, 4, 3), nn.Flatten(), nn.ReLU(inplace=True), nn.Linear(64, 3)))
    held.ensemble.train(training)
    held.sampling(small_then_large)
    assert not held.ensemble.report().why_no_plan
    assert not held.warned


@torch.library.custom_op("fastens_tests::clamp_first", mutates_args=("x",))
def clamp_first(x: torch.Tensor) -> None:
    x.clamp_(-5, 5)


@torch.library.custom_op("fastens_tests::clamp_second", mutates_args=("x",))
def clamp_second(like: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    x.clamp_(-5, 5)
    return like.clone()


OPERATIONS = {
    "an operation's first argument": clamp_first,
    "its second": lambda x: clamp_second(x, x),
    "its overload": lambda x: torch.ops.fastens_tests.clamp_first.default(x),
    "a list": lambda x: torch._foreach_clamp_max_([x], 5.0),  # pyright: ignore[reportPrivateImportUsage]
    "a row": lambda x: x[torch.tensor(0)].clamp_(-5, 5),
}


class ByOperation(nn.Module):
    """Writes by operations whose names do not say that they do."""

    def __init__(self, made, seen, write, first):
        super().__init__()
        self.made, self.seen, self.write, self.first = made, seen, write, first
        self.k, self.s = nn.Parameter(torch.zeros(4, 4, 3, 3)), nn.Parameter(torch.zeros(()))

    def forward(self, x):
        h = self.made(self, x)
        seen = self.seen(h)
        self.write(h if self.first else seen)
        return (seen if self.first else h) * self.s


@pytest.mark.parametrize("first", [False, True], ids=["the second is written to", "the first is written to"])
@pytest.mark.parametrize("write", OPERATIONS)
@pytest.mark.parametrize(("made", "seen"), [("half of the rows", "contiguous"), ("image, channels last", "flattened")])
def test_writes_of_operations_reach_what_they_reach_in_members(made, seen, write, first):
    held = Held(lambda _: ByOperation(MADE[made], SEEN[seen], OPERATIONS[write], first))
    held.sampling(small_then_large)


TURNED = {
    "copied": lambda h: h.transpose(0, 1).contiguous().transpose(0, 1),
    "reshaped": lambda h: h.transpose(0, 1).reshape(4, -1).unflatten(1, (-1, 36)).transpose(0, 1),
}


@pytest.mark.parametrize("first", [False, True], ids=["the second is written to", "the first is written to"])
@pytest.mark.parametrize("turned", TURNED)
def test_rows_of_members_of_their_own(turned, first):
    """A row that is dealt out alone is contiguous where it is not in its batch."""
    held = Held(lambda _: Writes(image, TURNED[turned], first))
    members = [0, 1]
    for seed in (0, 1, 2):
        (x,) = small_then_large(torch.Generator().manual_seed(seed))
        with held.ensemble.assigned(members):
            found = held.quietly(lambda x=x: held.ensemble(x))
        loop = held.loop(x)
        near(found, torch.stack([loop[k][row] for row, k in enumerate(members)]))
