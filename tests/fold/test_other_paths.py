"""Where torch itself takes another path for plain tensors, or a plan rests on tensors that are no weights."""

import copy
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import fastens


class Padded(nn.Module):
    """A transformer over padded tokens: torch leaves padded places out, and zero, where it need not differentiate."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x, padding):
        return self.encoder(x, src_key_padding_mask=padding)

    def method(self, x, padding):
        return self.forward(x, padding)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested", "ignore:fastens. members are evaluated one by one")
@pytest.mark.parametrize("method", ["__call__", "method"])
@pytest.mark.parametrize("differentiated", [False, True])
@pytest.mark.parametrize("engine", ["auto", "loop"])
def test_padded_places(engine, differentiated, method):
    torch.manual_seed(0)
    members = [Padded().eval() for _ in range(3)]
    ensemble = fastens.Ensemble(members, engine=engine)
    nothing = torch.zeros(4, 6, dtype=torch.bool)
    padding = torch.arange(6) >= torch.tensor([[6], [3], [4], [2]])
    with torch.set_grad_enabled(differentiated):
        for mask in (nothing, nothing, padding, padding, nothing, padding):
            x = torch.randn(4, 6, 8)
            expected = torch.stack([getattr(member, method)(x, mask) for member in members]).mean(0)
            torch.testing.assert_close(getattr(ensemble, method)(x, mask), expected, atol=1e-5, rtol=1e-5)


class OfTensors(nn.Module):
    """Rests on tensors that are neither parameters nor buffers."""

    def __init__(self, shared) -> None:
        super().__init__()
        self.layer, self.scale, self.scales = nn.Linear(4, 4), torch.tensor(2.5), [torch.ones(4), {"a": torch.ones(4)}]
        self.gain = lambda h: h * shared

    def forward(self, x):
        return self.gain(self.layer(x) * (self.scale * 2) * self.scales[0] * self.scales[1]["a"])


CHANGES = {
    "attribute": lambda m, shared: m.scale.mul_(2),
    "part of a list": lambda m, shared: m.scales[0].copy_(torch.arange(4.0)),
    "nested": lambda m, shared: m.scales[1]["a"][1:].fill_(3.0),
    "closure": lambda m, shared: shared.add_(1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_tensors_that_are_no_weights_are_written_to(change):
    torch.manual_seed(0)
    ours, theirs = torch.ones(4), torch.ones(4)
    members = [OfTensors(theirs) for _ in range(3)]
    own = [OfTensors(ours) for _ in range(3)]
    for a, b in zip(own, members, strict=True):
        a.load_state_dict(b.state_dict())
    ensemble, x = fastens.Ensemble(own), torch.randn(5, 4)
    with torch.no_grad():
        for _ in range(2):
            for _ in range(3):
                torch.testing.assert_close(ensemble(x), torch.stack([m(x) for m in members]).mean(0))
            CHANGES[change](ensemble.network, ours)
            for member in members if change != "closure" else members[:1]:
                CHANGES[change](member, theirs)
    assert "planned" in str(ensemble.report()) or ensemble.engine == "fold"


class Sparse(nn.Module):
    """Multiplies by a sparse matrix, as networks on graphs do."""

    def __init__(self, buffer) -> None:
        super().__init__()
        self.layer, matrix = nn.Linear(8, 8), (torch.eye(8) * torch.arange(8.0)).to_sparse()
        self.register_buffer("matrix", matrix) if buffer else setattr(self, "matrix", matrix)

    def forward(self, x):
        return torch.sparse.mm(self.matrix, self.layer(x).t()).t()


@pytest.mark.filterwarnings("ignore:fastens. members are evaluated one by one")
@pytest.mark.parametrize("buffer", [False, True])
def test_sparse_matrices(buffer):
    members, x = [Sparse(buffer) for _ in range(3)], torch.randn(4, 8)
    ensemble = fastens.Ensemble(copy.deepcopy(members))
    for _ in range(3):
        torch.testing.assert_close(ensemble(x), torch.stack([m(x) for m in members]).mean(0))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_in_autocast(kind):
    members, x = [kind(4, 6, batch_first=True).eval() for _ in range(3)], torch.randn(4, 7, 4)
    try:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            members[0](x)
    except RuntimeError as error:  # of oneDNN, on processors without such instructions
        pytest.skip(f"a {kind.__name__} itself raises in autocast here: {error}")
    ensemble = fastens.Ensemble(members)
    for _ in range(3):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            expected, found = torch.stack([m(x)[0] for m in members]), ensemble.member_outputs(x)[0]
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected)


class AsksWhich(nn.Module):
    """Asks whether two of its arguments are one object."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x, context=None, more=()):
        h = self.layer(x)
        return h if context is x or any(y is x for y in more) else h * 2


@pytest.mark.filterwarnings("ignore:fastens. members are evaluated one by one")
@pytest.mark.parametrize("settings", [{}, {"engine": "loop"}, {"max_fold": 4}], ids=["folded", "looped", "in passes"])
def test_arguments_that_are_one_object(settings):
    members, x = [AsksWhich() for _ in range(3)], torch.randn(5, 4)
    ensemble = fastens.Ensemble(members, **settings)
    calls = [(x, x), (x, x.clone()), (x, x.view(5, 4)), (x, None, [x]), (x, None, [x.view_as(x)]), (x, x, [x, x])]
    with torch.no_grad():
        for call in calls * 3:
            torch.testing.assert_close(ensemble(*call), torch.stack([m(*call) for m in members]).mean(0))
            with ensemble.assigned([0, 2, 1, 1, 0]):
                rows = [members[k](*call)[i] for i, k in enumerate([0, 2, 1, 1, 0])]
                torch.testing.assert_close(ensemble(*call), torch.stack(rows))


class Counts(nn.Module):
    """Counts its calls, in an attribute and in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(8, 8), 0
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.count = self.count + 1
        return self.layer(x) * (self.calls + self.count)


TRANSFORMS = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "vmap": lambda f, x: torch.vmap(f, randomness="same")(x[:, None])[:, 0],
}


@pytest.mark.filterwarnings("ignore:fastens. members are evaluated one by one")
@pytest.mark.parametrize("rows", [None, [2, 0, 1, 1]], ids=["all members", "assigned"])
@pytest.mark.parametrize("first", [0, 2], ids=["the first call", "a later one"])
@pytest.mark.parametrize("transform", ["jvp", "vmap"])
def test_what_members_write_inside_a_transform(transform, first, rows):
    if rows is not None and transform == "vmap":
        pytest.skip("each row alone has no member of its own")
    members, x = [Counts() for _ in range(3)], torch.randn(4, 8)
    ensemble = fastens.Ensemble(copy.deepcopy(members))
    with torch.no_grad():
        for step in range(5):
            inside = step == first
            call = (lambda f: TRANSFORMS[transform](f, x)) if inside else (lambda f: f(x))
            if rows is not None and inside:
                with ensemble.assigned(rows):
                    found = call(ensemble)
                for k in sorted(set(rows)):
                    alone = call(members[k])
                    for i in [i for i, row in enumerate(rows) if row == k]:
                        torch.testing.assert_close(found[i], alone[i])
            else:
                torch.testing.assert_close(call(ensemble), torch.stack([call(m) for m in members]).mean(0))


IN_PLACE = {
    "clamp": lambda p, x: torch.clamp(x, p, x + 1),
    "clamp of a number": lambda p, x: torch.clamp(p * x, -0.5, 0.5),
    "cumprod": lambda p, x: (p * x).cumprod_(0),
    "scatter": lambda p, x: (p * x).scatter_reduce_(0, torch.zeros(5, 5, dtype=torch.long), p * 1.0, "prod"),
    "index": lambda p, x: (p * x).index_reduce_(0, torch.tensor([0, 0, 1, 2, 3]), p * 1.0, "prod"),
}


class Applies(nn.Module):
    """A function of a parameter and the input."""

    def __init__(self, function) -> None:
        super().__init__()
        self.p, self.function = nn.Parameter(torch.randn(5, 5)), function

    def forward(self, x):
        return self.function(self.p, x)


@pytest.mark.filterwarnings("ignore:fastens. members are evaluated one by one", "ignore:index_reduce")
@pytest.mark.parametrize("function", IN_PLACE)
def test_gradients_of_what_is_written_in_place(function):
    torch.manual_seed(0)
    members = [Applies(IN_PLACE[function]) for _ in range(3)]
    ensemble = fastens.Ensemble(copy.deepcopy(members))
    for _ in range(2):
        x = torch.randn(5, 5).requires_grad_()
        y = x.detach().clone().requires_grad_()
        ensemble(x).square().sum().backward()
        torch.stack([m(y) for m in members]).mean(0).square().sum().backward()
        torch.testing.assert_close(x.grad, y.grad)
    (stack,) = ensemble.parameters()
    torch.testing.assert_close(stack.grad, torch.stack([m.p.grad for m in members]))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested", "ignore:fastens. members are evaluated one by one")
def test_padded_places_in_autocast():
    members, x = [Padded().eval() for _ in range(3)], torch.randn(4, 6, 8)
    ensemble, padding = fastens.Ensemble(members), torch.arange(6) >= torch.tensor([[6], [3], [4], [2]])
    with torch.autocast("cpu", torch.bfloat16):
        expected = torch.stack([m(x, padding) for m in members]).mean(0)
        torch.testing.assert_close(ensemble(x, padding), expected, atol=3e-2, rtol=3e-2)


class Doubles(TorchFunctionMode):
    """Changes what one function gives, and counts what it sees."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.seen[getattr(func, "__name__", "")] += 1
        return result * 2 if func is torch.tanh else result


class Recurs(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.gru = nn.LSTM(4, 6, batch_first=True, bidirectional=True), nn.GRU(12, 4)

    def forward(self, x):
        return torch.tanh(self.gru(self.lstm(x)[0].transpose(0, 1))[0].transpose(0, 1))


@pytest.mark.parametrize("rows", ["all members", "assigned"])
@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("engine", ["auto", "loop"])
def test_a_function_mode_sees_what_members_call(engine, called, rows):
    torch.manual_seed(0)
    members, x, to = [Recurs() for _ in range(3)], torch.randn(3, 5, 4), torch.tensor([2, 0, 1])
    ensemble = fastens.Ensemble(members, engine=engine)
    assigned = rows == "assigned"
    with torch.no_grad(), ensemble.assigned(to) if assigned else nullcontext():
        if called:
            ensemble(x), ensemble(x)
        with Doubles() as ours:
            answer = ensemble(x)
        with Doubles() as theirs:
            outputs = torch.stack([member(x) for member in members])
        expected = outputs[to, torch.arange(3)] if assigned else outputs.mean(0)
        torch.testing.assert_close(answer, expected, atol=1e-5, rtol=1e-5)
        names = ("tanh", "lstm", "gru")
        if called:  # a first call is checked besides
            assert [ours.seen[name] for name in names] == [theirs.seen[name] for name in names]
