"""K members trained in one folded pass: the gradients and the steps are those of separate training."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastens
from fastens.training import clip_member_grad_norms, member_forward, training_step
from tests.networks import NETWORKS, mlp, randomised, tensor_of
from tests.tolerances import NETWORK, relative_error

# Gradients, relative to a parameter's own largest one, or to the hundredth part of the member's largest: a key's bias
# has no effect behind a softmax, and its gradient is nothing but rounding.
GRADIENT = {torch.float64: 1e-10, torch.float32: 1e-5}
FLOOR = {torch.float64: 1e-6, torch.float32: 1e-2}
# The EDM-like network computes its norm in float32, whatever its weights are: torch refuses that in float64.
CASES = [(name, dtype) for name in NETWORKS for dtype in GRADIENT if (name, dtype) != ("edm_like", torch.float64)]


def as_dtype(value, dtype):
    return value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value


def own_rows(arguments, num_members, batch, dtype):
    """Each member's arguments, and the same stacked."""
    generator = torch.Generator().manual_seed(5)

    def varied(value):
        if torch.is_tensor(value) and value.ndim and value.is_floating_point():
            value = value + 0.1 * torch.randn(value.shape, generator=generator)
        return as_dtype(value, dtype)

    def stack(values):
        return torch.stack(values) if torch.is_tensor(values[0]) and values[0].ndim else values[0]

    alone = []
    for _ in range(num_members):
        args, kwargs = arguments(batch)
        alone.append((tuple(map(varied, args)), {name: varied(value) for name, value in kwargs.items()}))
    args = [stack([a[i] for a, _ in alone]) for i in range(len(alone[0][0]))]
    return alone, args, {name: stack([k[name] for _, k in alone]) for name in alone[0][1]}


def check_gradients(ensemble, members, dtype):
    parameters = {name: p for name, p in ensemble.network.named_parameters() if p.requires_grad}
    assert parameters
    for k, member in enumerate(members):
        expected = {name: p.grad for name, p in member.named_parameters() if p.requires_grad}
        largest = max(float(g.abs().max()) for g in expected.values() if g is not None)
        for name, grad in expected.items():
            if grad is None:
                assert parameters[name].grad is None
                continue
            scale = max(float(grad.abs().max()), FLOOR[dtype] * largest)
            assert float((parameters[name].grad[k] - grad).abs().max()) < GRADIENT[dtype] * scale, name


@pytest.mark.covering(1)
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_gradients_of_the_aggregate_equal_the_members(name, dtype):
    make, arguments = NETWORKS[name]
    members = [randomised(make, seed).to(dtype) for seed in range(3)]
    args, kwargs = arguments(2)
    args = [as_dtype(value, dtype) for value in args]
    kwargs = {name: as_dtype(value, dtype) for name, value in kwargs.items()}
    ours, theirs = args[0].clone().requires_grad_(), args[0].clone().requires_grad_()
    ensemble = fastens.Ensemble(members, engine="fold")
    tensor_of(ensemble(ours, *args[1:], **kwargs)).square().sum().backward()
    stack = torch.stack([tensor_of(member(theirs, *args[1:], **kwargs)) for member in members])
    stack.mean(0).square().sum().backward()
    assert ensemble.engine == "fold"
    assert relative_error(ours.grad, theirs.grad) < GRADIENT[dtype]
    check_gradients(ensemble, members, dtype)


@pytest.mark.covering(1)
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_one_backward_gives_each_member_its_own_gradient(name, dtype):
    make, arguments = NETWORKS[name]
    members = [randomised(make, seed).to(dtype) for seed in range(3)]
    alone, args, kwargs = own_rows(arguments, 3, 4, dtype)
    ensemble = fastens.Ensemble(members, engine="fold")
    outputs = tensor_of_stack(member_forward(ensemble, *args, **kwargs))
    outputs.square().flatten(1).mean(1).sum().backward()
    for k, (member, (own, named)) in enumerate(zip(members, alone, strict=True)):
        output = tensor_of(member(*own, **named))
        assert relative_error(outputs[k].detach(), output.detach()) < NETWORK[dtype]
        output.square().mean().backward()
    assert ensemble.engine == "fold"
    check_gradients(ensemble, members, dtype)


def tensor_of_stack(output):
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("max_fold", [None, 1, 5])
@pytest.mark.parametrize("engine", ["fold", "loop", "modules"])
def test_steps_equal_separate_steps(engine, max_fold):
    members = [randomised(mlp, seed).double() for seed in range(3)]
    if engine == "modules":  # members of different structure, which are held as they are
        members[2] = nn.Sequential(members[2], nn.Tanh())
    kind = "loop" if engine == "modules" else engine
    ensemble = fastens.Ensemble(members, engine=kind, max_fold=max_fold)
    optimizer = torch.optim.AdamW(ensemble.parameters(), lr=1e-2)
    members = [copy.deepcopy(member) for member in members]
    separate = [torch.optim.AdamW(member.parameters(), lr=1e-2) for member in members]
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        x, target = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)
        losses = training_step(ensemble, optimizer, lambda y, t=target: (y - t).square(), x, max_norm=0.3)
        for k, (member, each) in enumerate(zip(members, separate, strict=True)):
            loss = F.mse_loss(member(x[k]), target[k])
            each.zero_grad()
            loss.backward()
            assert nn.utils.clip_grad_norm_(member.parameters(), 0.3) > 0.3  # it does clip
            each.step()
            assert abs(float(losses[k]) - float(loss.detach())) < 1e-10
    for ours, theirs in zip(ensemble.members, members, strict=True):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert relative_error(a.detach(), b.detach()) < 1e-9


def test_clipping_leaves_small_gradients_alone():
    ensemble = fastens.Ensemble([randomised(mlp, seed) for seed in range(3)])
    x = torch.randn(3, 4, 5) * torch.tensor([1.0, 10.0, 0.0]).view(3, 1, 1)
    member_forward(ensemble, x).square().flatten(1).mean(1).sum().backward()
    before = [p.grad.clone() for p in ensemble.parameters()]
    norms = clip_member_grad_norms(ensemble, float("inf"))
    middle = float(norms.sort().values[1])
    clip_member_grad_norms(ensemble, middle)
    for k in range(3):
        same = [torch.equal(p.grad[k], old[k]) for p, old in zip(ensemble.parameters(), before, strict=True)]
        assert all(same) == (norms[k] < middle) or norms[k] == middle
    assert float(clip_member_grad_norms(ensemble, 1e9).max()) == pytest.approx(middle, rel=1e-5)


@pytest.mark.parametrize("max_fold", [None, 2, 5])
def test_statistics_of_batch_norm_are_those_of_separate_training(max_fold):
    members = [
        randomised(lambda: nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)), seed).train() for seed in range(3)
    ]
    twins = [copy.deepcopy(member) for member in members]
    ensemble = fastens.Ensemble(members, engine="fold", max_fold=max_fold)
    x = torch.randn(3, 4, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        member_forward(ensemble, x)
        for twin, rows in zip(twins, x, strict=True):
            twin(rows)
    for ours, twin in zip(ensemble.members, twins, strict=True):
        for name, buffer in twin.named_buffers():
            assert relative_error(dict(ours.named_buffers())[name], buffer) < 1e-6, name


def test_dropout_in_training_is_folded():
    members = [
        randomised(lambda: nn.Sequential(nn.Linear(5, 64), nn.Dropout(0.5), nn.Linear(64, 2)), seed).train()
        for seed in range(2)
    ]
    ensemble = fastens.Ensemble(members, engine="fold")
    member_forward(ensemble, torch.randn(2, 4, 5))
    report = ensemble.report()
    assert report.engine == "fold"
    assert report.looped == []
    assert "random" in report.why


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda e, o: training_step(e, o, torch.mean, torch.randn(2, 3, 5)), ValueError, r"expected \[2, \.\.\.\]"),
        (
            lambda e, o: member_forward(e, torch.randn(3, 5)),
            ValueError,
            r"expected a tensor \[2, B, \.\.\.\], got \[3, 5",
        ),
        (lambda e, o: member_forward(e, torch.randn(3)), ValueError, "no tensor of two dimensions"),
        (
            lambda e, o: training_step(e, torch.optim.LBFGS(e.parameters()), torch.square, torch.randn(2, 3, 5)),
            TypeError,
            "LBFGS",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    ensemble = fastens.Ensemble([randomised(mlp, seed) for seed in range(2)])
    with pytest.raises(error, match=message):
        call(ensemble, torch.optim.SGD(ensemble.parameters()))


def test_members_on_rows_of_their_own_are_planned():
    make, arguments = NETWORKS["dit"]
    members = [randomised(make, seed).eval() for seed in range(2)]
    ensemble = fastens.Ensemble(members)
    alone, args, kwargs = own_rows(arguments, 2, 3, torch.float32)
    with torch.no_grad():
        for _ in range(3):
            found = member_forward(ensemble, *args, **kwargs)
        for k, (own_args, own_kwargs) in enumerate(alone):
            assert relative_error(found[k], tensor_of(members[k](*own_args, **own_kwargs))) < NETWORK[torch.float32]
    assert ensemble.report().plans or not ensemble.report().target, ensemble.report().why_no_plan


@pytest.mark.parametrize("engine", ["fold", "loop", "modules"])
def test_rows_of_a_members_own_keep_their_bits_in_every_batch(engine):
    members = [randomised(lambda: nn.Sequential(nn.Linear(33, 65), nn.SiLU(), nn.Linear(65, 9)), k) for k in range(3)]
    if engine == "modules":
        members[2] = nn.Sequential(members[2], nn.Tanh())
    ensemble = fastens.Ensemble(members, engine="fold" if engine == "fold" else "loop")
    x = torch.randn(3, 16, 33, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), fastens.deterministic():
        whole = member_forward(ensemble, x)
        for rows in (slice(0, 1), slice(3, 5), slice(2, 13)):
            assert torch.equal(member_forward(ensemble, x[:, rows]), whole[:, rows])


@pytest.mark.parametrize("engine", ["fold", "loop"])
def test_a_compiled_step_gives_the_members_gradients(engine):
    members = [randomised(mlp, seed) for seed in range(3)]
    ensemble, x = fastens.Ensemble(members, engine=engine), torch.randn(3, 4, 5)
    members = [copy.deepcopy(member) for member in members]

    def loss(x):
        return member_forward(ensemble, x).square().flatten(1).mean(1).sum()

    torch.compile(loss, backend="aot_eager", fullgraph=engine == "fold")(x).backward()
    for k, member in enumerate(members):
        member(x[k]).square().mean().backward()
    check_gradients(ensemble, members, torch.float32)


class Skipping(nn.Module):
    """A network that uses one of its layers at high noise alone."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, t):
        h = self.first(x)
        return self.second(h) if t.mean() > 0.5 else h


@pytest.mark.filterwarnings("ignore:fastens. members are evaluated one by one")
@pytest.mark.parametrize(
    ("decay", "times", "moves"), [(0.1, (0.9, 0.1), True), (0.0, (0.9, 0.1), False), (0.1, (0.9, 0.8), False)]
)
def test_a_parameter_that_some_members_do_not_use_is_named_where_it_moves(decay, times, moves, recwarn):
    members = [randomised(Skipping, seed) for seed in range(2)]
    ensemble = fastens.Ensemble(members).train()
    optimizer = torch.optim.AdamW(ensemble.parameters(), lr=1e-2, weight_decay=decay)
    x, t = torch.randn(2, 3, 4), torch.tensor(times).view(2, 1).expand(2, 3).contiguous()
    weight = dict(ensemble.network.named_parameters())["second.weight"]
    before = weight.detach().clone()
    training_step(ensemble, optimizer, lambda y: y.square(), x, t)
    assert not torch.equal(weight.detach()[0], before[0])
    assert torch.equal(weight.detach()[1], before[1]) == (not moves and times[1] < 0.5)
    told = [str(w.message) for w in recwarn if "the optimizer moved" in str(w.message)]
    assert bool(told) == moves
    assert all("second.weight of member 1" in message for message in told)
