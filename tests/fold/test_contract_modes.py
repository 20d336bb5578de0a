"""What a call may change or depends on beside its arguments: buffers, modes, parametrizations."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import fastens
from tests.fold.contract import Held, K, batch, near

VECTORS, IMAGES = batch(5, 4), batch(5, 4, 6, 6)


class Averaging(nn.Module):
    """Keeps an average of its activations, equal in all members at the start."""

    def __init__(self, how):
        super().__init__()
        self.inner, self.how = nn.Linear(4, 4), how
        self.register_buffer("average", torch.zeros(4))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("history", torch.zeros(3, 4), persistent=False)

    def forward(self, x):
        h = torch.tanh(self.inner(x))
        if self.training:
            with torch.no_grad():
                self.how(self, h.detach().mean(0))
        return h - self.average / (1 + self.steps) + self.history.sum(0)


def assigned(net, mean):
    net.average = 0.9 * net.average + 0.1 * mean


def into_data(net, mean):
    net.average.data.add_(mean)
    net.steps.add_(1)


def augmented(net, mean):
    net.average += mean
    net.steps += 1


def at_index(net, mean):
    net.history[net.steps % 3] = mean
    net.steps += 1


def rolled(net, mean):
    net.history = torch.cat([mean[None], net.history[:-1]])


def counted(net, mean):
    net.steps += 1


WRITES = {
    "lerp_": lambda net, mean: net.average.lerp_(mean, 0.1),
    "copy_": lambda net, mean: net.average.copy_(mean),
    "out": lambda net, mean: torch.add(net.average, mean, out=net.average),
    "data": into_data,
    "assigned": assigned,
    "augmented": augmented,
    "at an index": at_index,
    "rolled": rolled,
    "counted": counted,
}


def buffers_agree(held):
    ours = dict(held.ensemble.named_buffers())
    for name, _ in held.members[0].named_buffers():
        stack = torch.stack([dict(m.named_buffers())[name] for m in held.members])
        if held.ensemble._engine is None:
            found = torch.stack([ours[f"network.{k}.{name}"] for k in range(K)])
        else:
            found = ours[f"network.{name}"]
        near(found if found.ndim == stack.ndim else found.expand_as(stack), stack)


@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("how", WRITES)
def test_buffers_that_are_equal_at_first(how, engine):
    held = Held(lambda k: Averaging(WRITES[how]), engine=engine)
    held.everywhere(VECTORS)
    buffers_agree(held)


@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, momentum=None)),
        lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.InstanceNorm2d(4, track_running_stats=True)),
        lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, affine=False)),
    ],
    ids=["batch", "instance", "without weights"],
)
def test_statistics_of_normalisations(make, engine):
    held = Held(lambda k: make(), engine=engine)
    held.each(lambda module: module.train())
    for _ in range(2):
        held.gradients(IMAGES)
    buffers_agree(held)
    held.everywhere(IMAGES)
    buffers_agree(held)


class Wrapped(nn.Module):
    """A wrapper whose own mode says nothing of its network's, as samplers' libraries have."""

    def __init__(self, network):
        super().__init__()
        self.inner_model, self.gain = network, nn.Parameter(torch.zeros(4))

    def forward(self, x, sigma=1.0):
        return self.inner_model(x * sigma) * self.gain


def dropping():
    return nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4), nn.Linear(4, 4))


@pytest.mark.parametrize("engine", ["auto", "fold", "loop"])
def test_a_wrapper_in_training_around_a_network_in_evaluation(engine):
    def make(k):
        return Wrapped(dropping())

    # made() sets eval; the wrapper alone is trained, before and after the ensemble is made
    held = Held(make, engine=engine)
    held.each(lambda module: setattr(module, "training", True))
    held.sampling(VECTORS)
    held.gradients(VECTORS)
    buffers_agree(held)
    members = [made_in_training(make, k) for k in range(K)]
    held.ensemble = fastens.Ensemble([made_in_training(make, k) for k in range(K)], engine=engine)
    held.members = members
    assert held.ensemble.training
    held.sampling(VECTORS)
    held.gradients(VECTORS)
    buffers_agree(held)


def made_in_training(make, k):
    torch.manual_seed(k)
    member = make(k)
    member.train()
    member.inner_model.eval()
    return member


def second(module):
    return next(m for name, m in module.named_modules() if name.split(".")[-1] == "1")


def test_one_submodule_in_another_mode():
    held = Held(lambda k: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)))
    held.sampling(VECTORS)
    held.each(lambda module: second(module).train())
    held.sampling(VECTORS)
    held.gradients(VECTORS)
    buffers_agree(held)
    held.each(lambda module: second(module).eval())
    held.sampling(VECTORS)


def test_wrappers_of_k_diffusion():
    external = pytest.importorskip("k_diffusion.external")

    class Noise(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = dropping()

        def forward(self, x, sigma, **kwargs):
            return self.network(x) * sigma[:, None]

    def make(k):
        wrapped = external.VDenoiser(Noise())
        wrapped.train()
        wrapped.inner_model.eval()
        return wrapped

    members = [make(k) for k in range(2)]
    copies = [copy.deepcopy(m) for m in members]
    ensemble = fastens.Ensemble(members, engine="fold")
    x, sigma = torch.randn(5, 4), torch.rand(5) + 0.5
    with torch.no_grad():
        for _ in range(3):
            near(ensemble(x, sigma), torch.stack([m(x, sigma) for m in copies]).mean(0))


# Parametrizations are put on members

PARAMETRIZED = {
    "weight norm": lambda layer: parametrizations.weight_norm(layer),
    "old weight norm": lambda layer: nn.utils.weight_norm(layer),
    "spectral norm": lambda layer: parametrizations.spectral_norm(layer),
    "orthogonal": lambda layer: parametrizations.orthogonal(layer),
    "own": lambda layer: parametrize.register_parametrization(layer, "weight", Halved()),
    "pruning": lambda layer: prune.random_unstructured(layer, "weight", amount=0.5),
}


class Halved(nn.Module):
    def forward(self, weight):
        return 0.5 * weight


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("name", PARAMETRIZED)
def test_parametrizations_of_members(name):
    def make(k):
        layer = nn.Linear(4, 4)
        PARAMETRIZED[name](layer)
        return nn.Sequential(layer, nn.Tanh())

    held = Held(make)
    held.sampling(VECTORS)
    held.gradients(VECTORS)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("name", PARAMETRIZED)
def test_parametrizations_of_stacks(name):
    """They are refused by an error that says what to do; the ensemble is as before."""
    held = Held(lambda k: nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
    held.sampling(VECTORS)
    with pytest.raises((ValueError, RuntimeError), match="members") as raised:
        PARAMETRIZED[name](held.ensemble.network[0])
    assert "make the ensemble of them" in str(raised.value)
    held.sampling(VECTORS)
    held.gradients(VECTORS)
