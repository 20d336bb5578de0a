"""Layers called in several ways, and calls that differ in what the first call did not show."""

import pytest
import torch
from torch import nn

from fastens import _native
from tests.fold.contract import Held, averaged, batch, near

SQUARE = batch(4, 4, 6)  # batch and time of one size


class Twice(nn.Module):
    """One layer, called with the batch in front and then behind the time."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        h = self.layer(x)
        h = h[0] if isinstance(h, tuple) else h
        h = self.layer(h.transpose(0, 1))
        h = (h[0] if isinstance(h, tuple) else h).transpose(0, 1)
        return h * h.mean(1, keepdim=True)


LAYERS = {
    "linear": lambda: nn.Linear(6, 6),
    "norm": lambda: nn.LayerNorm(6),
    "group norm": lambda: nn.GroupNorm(2, 4),
    "convolution": lambda: nn.Conv1d(4, 4, 3, padding=1),
    "transposed convolution": lambda: nn.ConvTranspose1d(4, 4, 3, padding=1),
    "batch norm": lambda: nn.BatchNorm1d(4),
    "GRU": lambda: nn.GRU(6, 6),
    "GRU batch first": lambda: nn.GRU(6, 6, batch_first=True),
    "transformer layer": lambda: nn.TransformerEncoderLayer(6, 2, 8, 0.0),
    "transformer layer batch first": lambda: nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=True),
    "prelu": lambda: nn.PReLU(4),
}


@pytest.mark.parametrize("draw", [SQUARE, batch(12, 4, 6)], ids=["square", "as many rows as members times time"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_called_with_the_batch_in_two_places(name, draw):
    if draw is not SQUARE and name in ("group norm", "convolution", "transposed convolution", "batch norm", "prelu"):
        pytest.skip("channels are counted")
    held = Held(lambda k: Twice(LAYERS[name]()), engine="fold")
    held.everywhere(draw)


class Ordered(nn.Module):
    """Batch-first or time-first, as a flag among the arguments or on the module says."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.time_first = layer, False

    def forward(self, x, time_first=None):
        if self.time_first if time_first is None else time_first:
            h = self.layer(x.transpose(0, 1).cumsum(0)).transpose(0, 1)
            return h - h.mean(0)
        return self.layer(x)


@pytest.mark.parametrize("flags", [(False, True, False), (True, False, True, False), (0, 1, 0)])
@pytest.mark.parametrize("how", ["argument", "keyword", "attribute"])
@pytest.mark.parametrize("name", ["linear", "group norm", "convolution"])
def test_a_flag_that_says_where_the_batch_is(name, how, flags):
    held = Held(lambda k: Ordered(LAYERS[name]()))
    for flag in flags:
        if how == "attribute":
            held.each(lambda module, flag=flag: setattr(module, "time_first", flag))
            held.sampling(SQUARE)
        elif how == "keyword":
            held.sampling(SQUARE, time_first=flag)
        else:
            held.sampling(lambda generator, flag=flag: (*SQUARE(generator), flag))
    held.gradients(SQUARE, time_first=flags[1])
    assert held.ensemble.engine == "fold"


class Reading(nn.Module):
    """Reads its weights, so that it is looped, and takes a table beside its input."""

    def __init__(self):
        super().__init__()
        self.inner, self.gain = nn.Linear(4, 4), nn.Parameter(torch.zeros(1))

    def forward(self, x, bank, *more):
        h = self.inner(x) * float(self.gain.detach())
        for each in more:
            h = h + each.mean()
        return h + torch.softmax(h @ bank.T, 1) @ bank


class Within(nn.Module):
    """The same, as a part of a network that could be folded."""

    def __init__(self):
        super().__init__()
        self.first, self.part = nn.Linear(4, 4), Reading()

    def forward(self, x, bank, *more):
        return self.part(torch.tanh(self.first(x)), bank, *more)


@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("kind", [Reading, Within])
def test_a_looped_module_whose_argument_looks_like_the_batch_now_and_then(kind, engine):
    held = Held(lambda k: kind(), engine=engine)
    for entries in (5, 7, 5, 3, 15):
        held.sampling(lambda g, n=entries: (torch.randn(5, 4, generator=g), torch.randn(n, 4, generator=g)), 2)
    held.gradients(lambda g: (torch.randn(5, 4, generator=g), torch.randn(5, 4, generator=g)))


class Optional(nn.Module):
    """Takes as many tensors as it is given."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, *contexts, mask=None, extra=None):
        h = torch.tanh(self.inner(x))
        for context in contexts:
            h = h + self.outer(context)
        if extra is not None:
            h = h + sum(self.outer(e) for e in extra)
        return h if mask is None else h * mask


@pytest.mark.parametrize("kind", [Optional, Within])
def test_numbers_of_tensor_arguments_that_change(kind):
    held = Held(lambda k: kind())
    least = 0 if kind is Optional else 1
    for count in (least, 2, 1, least, 3):
        held.sampling(lambda g, n=count: tuple(torch.randn(5, 4, generator=g) for _ in range(1 + n)), 2)
    if kind is Optional:
        x = torch.randn(5, 4)
        with torch.no_grad():
            for keywords in ({}, {"mask": x > 0}, {"extra": [x, x]}, {"extra": [x]}, {"extra": (x,)}, {"mask": None}):
                for _ in range(2):
                    held.call(x, **keywords)
    assert (held.ensemble.engine == "fold") is (kind is Optional)


class Flagged(nn.Module):
    """What a plain value among the arguments chooses."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x, flip=0, mode="plain", scale=1.0, options=None, dims=(1,)):
        h = self.inner(x)
        if flip == 1:
            h = h.flip(0)
        if mode == "mean":
            h = h - h.mean(0)
        if options and options.get("doubled"):
            h = 2 * h
        return (h * scale if scale else h + 1).cumsum(dims[0])


CHANGES = {
    "integer": [{"flip": 1}, {"flip": 0}, {"flip": 1}, {"flip": 2}],
    "boolean": [{"flip": True}, {"flip": False}, {"flip": 1}, {"flip": 0}],
    "text": [{"mode": "mean"}, {"mode": "plain"}, {"mode": "mean"}],
    "number": [{"scale": 0.0}, {"scale": 1.0}, {"scale": 0.25}, {"scale": 0}, {"scale": -0.0}],
    "dict": [{"options": {"doubled": True}}, {"options": {"doubled": False}}, {"options": {}}, {"options": None}],
    "tuple": [{"dims": (0,)}, {"dims": (1,)}, {"dims": [0]}, {"dims": (-1, 3)}],
}


@pytest.mark.parametrize("engine", ["auto", "fold", "loop"])
@pytest.mark.parametrize("kind", CHANGES)
def test_plain_values_are_part_of_the_signature(kind, engine):
    held = Held(lambda k: Flagged(), engine=engine)
    for _ in range(2):
        for keywords in CHANGES[kind]:
            held.sampling(batch(5, 4), 2, **keywords)
            held.gradients(batch(5, 4), **keywords)
    assert held.ensemble.engine == ("loop" if engine == "loop" else "fold")


class Branching(nn.Module):
    """Mixes rows in a branch that depends on the values of its input."""

    def __init__(self, when):
        super().__init__()
        self.inner, self.when = nn.Linear(4, 4), when

    def forward(self, x, t):
        h = self.inner(x)
        return h + h.mean(0) + h.std(0) if self.when(x, t) else torch.tanh(h)


WHEN = {
    "time": lambda x, t: bool((t > 500).any()),
    "number": lambda x, t: float(t[0]) > 500,
    "all": lambda x, t: bool(torch.all(t > 500)),
    "input": lambda x, t: x.sum().item() > 0,
    "rows": lambda x, t: len(x) > 4,
    "dtype": lambda x, t: t.dtype == torch.long,
    "strides": lambda x, t: not x.is_contiguous(),
}


@pytest.mark.parametrize("name", WHEN)
def test_a_branch_that_the_first_call_did_not_take(name):
    held = Held(lambda k: Branching(WHEN[name]), engine="fold")
    x = torch.randn(5, 4)
    times = [torch.full((5,), t, dtype=d) for t in (3, 700, 20, 900) for d in (torch.float32, torch.long)]
    with torch.no_grad():
        for t in times:
            for given in (x, -x, x[:3], x.T.contiguous().T):
                held.call(given, t[: len(given)])
    held.gradients(lambda g: (torch.randn(5, 4, generator=g), times[2]))


class Strided(nn.Module):
    """Takes another way where the layout allows no view, which is a member's own and not the fold's."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Conv1d(4, 4, 1)

    def forward(self, x):
        h = self.inner(x).transpose(1, 2)
        try:
            return h.view(len(h), -1).reshape(h.shape)
        except RuntimeError:
            return h + 1


@pytest.mark.parametrize("differentiated", [False, True], ids=["", "gradients"])
@pytest.mark.parametrize("num_members", [1, 3])
@pytest.mark.parametrize("rule", ["alternating", "assigned"])
def test_a_first_call_of_drawn_rows_is_held_against_the_members(rule, num_members, differentiated):
    held = Held(lambda k: Strided(), num_members)
    x = torch.randn(3, 4, 6)
    candidates = torch.stack(held.loop(x))
    held.ensemble.rule = "mean" if rule == "assigned" else rule
    scope = held.ensemble.assigned([0, num_members - 1, 0]) if rule == "assigned" else held.ensemble.trajectory(3, 0)
    with scope, torch.set_grad_enabled(differentiated):
        for _ in range(2):
            found = held.quietly(lambda: held.ensemble(x))
            assert float((found - candidates).detach().abs().flatten(2).amax(2).min(0).values.max()) < 1e-5
    assert any("the fold is" in warning for warning in held.warned)


class Sized(nn.Module):
    """Asks a shape that it is given for what a tuple does not tell."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x, size, nested=None):
        return self.inner(x).view(size) / size.numel() + (0 if nested is None else nested["shape"].numel())


@pytest.mark.parametrize("engine", ["fold", "loop"])
def test_a_shape_among_the_arguments_stays_one(engine):
    held = Held(lambda k: Sized(), engine=engine)
    for shape in ((5, 4), (5, 4), (2, 4), (5, 2, 2)):
        x = torch.randn(5 if shape[0] == 5 else 2, 4)
        for kwargs in ({}, {"nested": {"shape": torch.Size(shape)}}):
            with torch.no_grad():
                expected = [member(x, torch.Size(shape), **kwargs) for member in held.members]
                near(held.ensemble(x, size=torch.Size(shape), **kwargs), averaged(expected))
    assert held.ensemble.engine == engine
    assert bool(held.ensemble.report().plans) == (engine == "fold" and _native.load())
