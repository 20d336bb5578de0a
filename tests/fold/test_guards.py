"""What a plan rests on, and every way in which that changes: the next answer is that of the members as they are now."""

import copy
import threading

import pytest
import torch
from torch import nn

import fastens
from fastens import _native
from fastens.network import weights
from fastens.training import training_step
from tests.networks import NETWORKS, randomised, tensor_of
from tests.tolerances import relative_error

pytestmark = pytest.mark.skipif(not _native.load(), reason=f"no compiled library: {_native.status()}")
K = 3


class Net(nn.Module):
    """A network with weights, buffers, attributes and a submodule that has a mode."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(4, 16), nn.LayerNorm(16), nn.Linear(16, 4)
        self.register_buffer("offset", torch.full((4,), 0.25))
        self.scale = 1.0

    def set_scale(self, scale):
        self.scale = scale

    def forward(self, x):
        return self.second(torch.tanh(self.norm(self.first(x)))) * self.scale + self.offset


X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def planned(make=Net, rule="mean", x=X):
    ensemble = fastens.Ensemble([randomised(make, seed) for seed in range(K)], rule)
    with torch.no_grad():
        for _ in range(2):
            ensemble(x)
    assert ensemble.report().plans, ensemble.report().why_no_plan
    return ensemble


def by_members(ensemble, x=X):
    """The loop over members as they are now: copies that the ensemble hands out."""
    with torch.no_grad():
        return torch.stack([member(x) for member in ensemble.members]).mean(0)


def optimizer_step(kind, **options):
    def change(ensemble):
        optimizer = kind(ensemble.parameters(), lr=0.1, **options)
        ensemble(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return change


def trained(ensemble):
    optimizer = torch.optim.AdamW(ensemble.parameters(), lr=0.1, fused=True)
    training_step(ensemble.train(), optimizer, lambda outputs: outputs.square().mean((1, 2)), X.expand(K, 6, 4))
    ensemble.eval()


def assigned_state(ensemble):
    ensemble.load_state_dict({name: 0.8 * t for name, t in ensemble.state_dict().items()}, assign=True)


def replaced_parameter(ensemble):
    stack = dict(ensemble.named_parameters())["network.first.weight"]
    ensemble.network.first.weight = nn.Parameter(0.5 * stack.detach())


def new_data(name):
    def change(ensemble):
        stack = dict(ensemble.named_parameters())[name]
        stack.data = 0.5 * stack.data

    return change


def written(write):
    def change(ensemble):
        with torch.no_grad():
            for p in ensemble.parameters():
                write(p)

    return change


def averaged(ensemble):
    """As diffusers' ``EMAModel.copy_to`` does."""
    for p, average in zip(ensemble.parameters(), [0.5 * p.detach() for p in ensemble.parameters()], strict=True):
        p.data.copy_(average.to(p.device).data)


def replaced_submodule(ensemble):
    other = fastens.Ensemble([randomised(Net, 10 + seed) for seed in range(K)])
    ensemble.network.second = other.network.second


CHANGES = {
    **{f"fused {kind.__name__}": optimizer_step(kind, fused=True)
       for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad)},
    "SGD": optimizer_step(torch.optim.SGD),
    "foreach": optimizer_step(torch.optim.Adam, foreach=True),
    "training_step": trained,
    "assign": assigned_state,
    "a parameter": replaced_parameter,
    "a submodule": replaced_submodule,
    "data of the first": new_data("network.first.weight"),
    "data of the last": new_data("network.second.bias"),
    "mul_": written(lambda p: p.mul_(0.5)),
    "set_": written(lambda p: p.set_(0.5 * p.detach().clone())),
    "a view": written(lambda p: p[1].mul_(0.5)),
    "a detached one": written(lambda p: p.detach().mul_(0.5)),
    "foreach_": lambda ensemble: torch._foreach_mul_([p.detach() for p in ensemble.parameters()], 0.5),
    "a buffer": lambda ensemble: ensemble.network.offset.add_(1.0),
    "another buffer": lambda ensemble: setattr(ensemble.network, "offset", torch.full((4,), 3.0)),
    "an attribute": lambda ensemble: setattr(ensemble, "scale", 3.0),
    "an attribute of the network": lambda ensemble: setattr(ensemble.network, "scale", 3.0),
    "a setter": lambda ensemble: ensemble.set_scale(3.0),
    "eps of a norm": lambda ensemble: setattr(ensemble.network.norm, "eps", 1.0),
    "a submodule by name": lambda ensemble: ensemble.network.add_module("second", nn.Linear(16, 4)),
    "a table of submodules": lambda ensemble: ensemble.network._modules.update(second=nn.Linear(16, 4)),
    "a table of parameters": lambda ensemble: vars(ensemble.network.second)["_parameters"].update(
        bias=nn.Parameter(torch.randn(K, 4))
    ),
    "a deleted bias": lambda ensemble: setattr(ensemble.network.norm, "bias", None),
    "float64": lambda ensemble: ensemble.double(),
}  # fmt: skip


@pytest.mark.parametrize("looks", ["library", "python"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_are_noticed(change, looks, monkeypatch):
    if looks == "python":
        monkeypatch.setattr(weights, "_watch_of", lambda tensors: None)
    ensemble = planned()
    with torch.no_grad():
        old = ensemble(X)
    change(ensemble)
    x = X.to(ensemble.dtype)
    expected = by_members(ensemble, x)
    assert relative_error(old.to(expected.dtype), expected) > 1e-3 or ensemble.dtype == torch.float64
    with torch.no_grad():
        for _ in range(3):
            assert relative_error(ensemble(x), expected) < 1e-5


@pytest.mark.parametrize("change", [averaged, written(lambda p: p.data.mul_(0.5))])
def test_what_torch_does_not_count_needs_a_refresh(change):
    ensemble = planned()
    change(ensemble)
    ensemble.refresh()
    with torch.no_grad():
        assert relative_error(ensemble(X), by_members(ensemble)) < 1e-5


def test_another_mode_implies_a_refresh():
    """An average that is copied in by ``.data`` between training and sampling is seen."""
    ensemble = planned()
    averaged(ensemble)
    ensemble.train()
    ensemble.eval()
    with torch.no_grad():
        assert relative_error(ensemble(X), by_members(ensemble)) < 1e-5


@pytest.mark.parametrize("first", [True, False])
def test_functional_calls_are_other_weights(first):
    ensemble = planned() if not first else fastens.Ensemble([randomised(Net, seed) for seed in range(K)])
    other = {name: 0.5 * t for name, t in (*ensemble.named_parameters(), *ensemble.named_buffers())}
    twin = copy.deepcopy(ensemble)
    twin.load_state_dict({name: t.detach() for name, t in other.items()})
    with torch.no_grad():
        for _ in range(3):
            found = torch.func.functional_call(ensemble, other, (X,))
            assert relative_error(found, by_members(twin)) < 1e-5
            assert relative_error(ensemble(X), by_members(ensemble)) < 1e-5


@pytest.mark.parametrize("engine", ["auto", "loop"])
def test_functional_calls_leave_the_callers_tensors(engine):
    """torch puts back into its caller's dictionary what it takes out again: the stacks, which are then trained."""
    ensemble = fastens.Ensemble([randomised(Net, seed) for seed in range(K)], engine=engine)
    own = dict(ensemble.named_parameters())
    other = {name: p.detach().clone().requires_grad_() for name, p in own.items()}
    given = dict(other)
    for _ in range(2):
        found = torch.func.functional_call(ensemble, other, (X,))
        assert all(other[name] is tensor for name, tensor in given.items())
        assert all(p is own[name] for name, p in ensemble.named_parameters())
        found.square().sum().backward()
    assert all(tensor.grad is not None for tensor in given.values())


class Dropping(Net):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return super().forward(self.dropout(x))


def test_one_submodules_mode_is_noticed():
    ensemble = planned(Dropping)
    ensemble.network.dropout.train()
    with torch.no_grad():
        answers = [ensemble(X) for _ in range(4)]
    assert not torch.equal(answers[0], answers[1])
    ensemble.network.dropout.eval()
    with torch.no_grad():
        assert relative_error(ensemble(X), by_members(ensemble)) < 1e-5


@pytest.mark.parametrize("where", ["a module", "all modules"])
def test_hooks_are_called_and_may_change_outputs(where):
    ensemble = planned()
    calls = []

    def hook(module, inputs, output):
        if getattr(module, "out_features", 0) == 4:
            calls.append(1)
            return 2 * output
        return None

    if where == "a module":
        handle = ensemble.network.second.register_forward_hook(hook)
    else:
        handle = nn.modules.module.register_module_forward_hook(hook)
    with torch.no_grad():
        changed = ensemble(X)
    handle.remove()
    assert calls
    with torch.no_grad():
        assert relative_error(ensemble(X), by_members(ensemble)) < 1e-5
    assert relative_error(changed, by_members(ensemble)) > 1e-3


# Published networks


@pytest.mark.parametrize("what", ["freeu", "processor", "module in training"])
def test_diffusers_setters_are_noticed(what):
    make, arguments = NETWORKS["unet_2d_condition"]
    members = [randomised(make, seed) for seed in range(2)]
    ensemble = fastens.Ensemble(members)
    args, kwargs = arguments(2)
    with torch.no_grad():
        for _ in range(2):
            ensemble(*args, **kwargs)
    assert ensemble.report().plans

    def change(module):
        if what == "freeu":
            module.enable_freeu(s1=0.5, s2=0.2, b1=1.5, b2=1.6)
        elif what == "processor":
            from diffusers.models.attention_processor import AttnProcessor

            module.set_attn_processor(AttnProcessor())
        else:
            module.mid_block.train()

    for module in (ensemble, *members):
        change(module)
    with torch.no_grad():
        expected = torch.stack([tensor_of(member(*args, **kwargs)) for member in members])
        for _ in range(3):
            assert relative_error(ensemble.member_outputs(*args, **kwargs), expected) < 1e-5


def test_division_is_exact_as_torchs():
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(1001, 4)

        def forward(self, x, t):
            return x + self.table((t.float() / 1000 * 1000).long())

    ensemble = fastens.Ensemble([randomised(Rows, seed) for seed in range(2)])
    times = torch.arange(1000)
    x = torch.zeros(1000, 4)
    with torch.no_grad():
        expected = torch.stack([member(x, times) for member in ensemble.members])
        for _ in range(3):
            assert torch.equal(ensemble.member_outputs(x, times), expected)
    assert ensemble.report().plans


def test_threads_while_weights_change():
    """Each answer is that of the weights before or after a change, never of a plan that is half of each."""
    ensemble = planned()
    states = []
    for factor in (1.0, 0.5):
        states.append({name: factor * t.clone() for name, t in ensemble.state_dict().items()})
    answers = []
    for state in states:
        ensemble.load_state_dict(state)
        answers.append(by_members(ensemble))
    failures, stop = [], threading.Event()
    lock = threading.Lock()

    def call():
        with torch.no_grad():
            while not stop.is_set():
                with lock:
                    found = ensemble(X)
                if min(relative_error(found, answer) for answer in answers) > 1e-5:
                    failures.append(1)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for i in range(20):
        with lock:
            ensemble.load_state_dict(states[i % 2])
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures
