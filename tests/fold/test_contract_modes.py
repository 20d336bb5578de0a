"""What a call may change or depends on beside its arguments: buffers, modes, attributes, hooks, methods."""

import copy
from typing import Any

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


# Methods, setters, attributes, hooks


class Network(nn.Module):
    """What samplers and their users ask of a network beside ``forward``."""

    def __init__(self):
        super().__init__()
        self.inner, self.scale, self.free, self.processor = nn.Linear(4, 4), 1.0, None, None
        self.sigmas = torch.linspace(0.1, 2.0, 5)
        self.register_buffer("levels", torch.linspace(0.1, 2.0, 5))

    def forward(self, x, t=1.0):
        h = self.inner(x) * self.scale * t
        if self.free is not None:
            h = torch.cat([self.free * h[:, :2], h[:, 2:]], 1)
        return h if self.processor is None else self.processor(h)

    def velocity(self, x, t=1.0):
        return self.forward(x, t) - x

    def called(self, x):
        return {"velocity": self(x).tanh(), "input": x, "name": "v"}

    def _forward(self, x):
        return self.inner(x).square().mean(0)

    def statistics(self, x):
        h = self.inner(x)
        return h.mean(0), [h.std(), x.argmax(1)], len(h)

    def round_sigma(self, sigma):
        return self.levels[(self.levels - sigma.reshape(-1, 1)).abs().argmin(1)]

    def enable_free(self, by):
        self.free = by

    def disable_free(self):
        self.free = None

    def set_processor(self, processor):
        self.processor = processor

    @torch.no_grad()
    def sample(self, x, steps=3):
        for i in range(steps):
            x = x + 0.1 * self(x, 1 / (i + 1))
        return x


@pytest.mark.parametrize("engine", ["auto", "fold", "loop", "apart"])
@pytest.mark.parametrize("method", ["velocity", "called", "_forward", "round_sigma"])
def test_methods_are_combined(method, engine):
    held = Held(lambda k: differing(Network(), k if engine == "apart" else 0), engine=engine.replace("apart", "auto"))
    for first in (method, "__call__", method):
        for seed in range(2):
            with torch.no_grad():
                held.call(*VECTORS(torch.Generator().manual_seed(seed)), method=first)
    held.call(torch.randn(5, 4), method=method)


def differing(network, k):
    network.apart = k
    return network


@pytest.mark.parametrize("engine", ["auto", "loop"])
def test_methods_that_return_several_things(engine):
    held = Held(lambda k: Network(), engine=engine)
    x = torch.randn(5, 4)
    outputs = held.loop(x, method="statistics")
    found = held.ensemble.statistics(x)
    near(found[0], torch.stack([o[0] for o in outputs]).mean(0))
    near(found[1][0], torch.stack([o[1][0] for o in outputs]).mean(0))
    near(found[1][1], outputs[0][1][1])
    assert found[2] == 5


@pytest.mark.parametrize("engine", ["auto", "loop"])
def test_indices_that_differ_between_members_are_an_error(engine):
    held = Held(lambda k: Network(), engine=engine)
    held.each(lambda module: module.set_processor(lambda h: h.argmax(1)))
    with pytest.raises(TypeError, match=r"members return different torch\.int64 tensors"):
        held.ensemble(torch.randn(5, 4))


SETTERS = {
    "method": (lambda m: m.enable_free(0.5), lambda m: m.disable_free()),
    "processor": (lambda m: m.set_processor(torch.tanh), lambda m: m.set_processor(None)),
    "closure": (lambda m: m.set_processor(lambda h: h - h.mean(0)), lambda m: m.set_processor(torch.sin)),
    "attribute": (lambda m: setattr(m, "scale", 3.0), lambda m: setattr(m, "scale", 1.0)),
    "of a layer": (lambda m: setattr(inside(m)[0].inner, "forward", torch.tanh) or spread(m), lambda m: unpatched(m)),
}  # fmt: skip


def inside(m) -> list[Any]:
    """The modules that hold the members' Python."""
    if not isinstance(m, fastens.Ensemble):
        return [m]
    network: Any = m.network
    return [network] if m._engine is not None else list(network.children())


def spread(m):
    for each in inside(m):
        each.inner.forward = torch.tanh


def unpatched(m):
    for each in inside(m):
        del each.inner.forward


@pytest.mark.parametrize("engine", ["auto", "loop", "apart"])
@pytest.mark.parametrize("first", [True, False], ids=["before the first call", "after some calls"])
@pytest.mark.parametrize("name", SETTERS)
def test_setters_reach_all_members_and_are_noticed(name, first, engine):
    held = Held(lambda k: differing(Network(), k if engine == "apart" else 0), engine=engine.replace("apart", "auto"))
    if not first:
        held.sampling(VECTORS)
    before = held.ensemble.engine
    for change in SETTERS[name] * 2:
        held.each(change)
        held.sampling(VECTORS)
        held.gradients(VECTORS)
    assert held.ensemble.engine == before
    assert held.ensemble.scale == held.members[0].scale


def test_setters_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    def make(k):
        return diffusers.UNet2DConditionModel(
            sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16),
            norm_num_groups=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=8, attention_head_dim=4,
        )  # fmt: skip

    held = Held(make, 2, engine="fold")
    x, t, c = torch.randn(2, 1, 8, 8), torch.tensor([3, 500]), torch.randn(2, 3, 8)
    changes = [
        lambda m: None,
        lambda m: m.enable_freeu(0.9, 0.2, 1.5, 1.6),
        lambda m: m.set_attn_processor(AttnProcessor()),
        lambda m: (m.disable_freeu(), m.set_attn_processor(AttnProcessor2_0())),
    ]
    results = []
    with torch.no_grad():
        for change in changes:
            held.each(change)
            results.append(held.call(x, t, c).sample)
    assert (results[1] - results[0]).abs().max() > 1e-3 * results[0].abs().max()


HOOKS = {
    "forward": lambda m, seen: m.register_forward_hook(lambda module, args, output: 2 * output),
    "forward with keywords": lambda m, seen: m.register_forward_hook(
        lambda module, args, kwargs, output: output + 1, with_kwargs=True),
    "pre": lambda m, seen: m.register_forward_pre_hook(lambda module, args: (args[0] * 0.5, *args[1:])),
    "mixing": lambda m, seen: m.register_forward_hook(lambda module, args, output: output - output.mean(0)),
    "looking": lambda m, seen: m.register_forward_hook(lambda module, args, output: seen.append(output.shape)),
}  # fmt: skip


@pytest.mark.parametrize("engine", ["auto", "loop", "apart"])
@pytest.mark.parametrize("where", ["a layer", "the whole"])
@pytest.mark.parametrize("name", HOOKS)
def test_hooks_run_in_fold_and_loop_and_leave_no_trace(name, where, engine):
    held = Held(lambda k: differing(Network(), k if engine == "apart" else 0), engine=engine.replace("apart", "auto"))
    held.sampling(VECTORS)
    before, seen, handles = held.ensemble.engine, [], []
    for module in (*held.members, *inside(held.ensemble)):
        handles.append(HOOKS[name](module if where == "the whole" else module.inner, seen))
    held.sampling(VECTORS)
    held.gradients(VECTORS)
    if name == "looking":
        assert seen
        assert set(seen) == {torch.Size([5, 4])}
    for handle in handles:
        handle.remove()
    held.sampling(VECTORS)
    assert held.ensemble.engine == before
    assert not any("looped" in w or "one by one" in w for w in held.warned) or engine == "apart"


def test_a_hook_on_the_ensemble_itself_is_the_ensembles():
    held = Held(lambda k: Network())
    x = torch.randn(5, 4)
    handle = held.ensemble.register_forward_hook(lambda module, args, output: output + 1)
    expected = torch.stack(held.loop(x)).mean(0) + 1
    near(held.ensemble(x), expected)
    handle.remove()


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
