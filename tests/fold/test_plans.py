"""A frozen ensemble on the CPU runs a recorded program: the same results, and never stale ones."""

import threading

import pytest
import torch
import torch.utils._pytree as pytree
from torch import nn

import fastens
from fastens import _native
from fastens.ops.run_program import target
from tests.networks import NETWORKS, randomised, tensor_of
from tests.tolerances import NETWORK, relative_error

pytestmark = pytest.mark.skipif(not _native.load(), reason=f"no compiled library: {_native.status()}")


def scaled(arguments, factor):
    return pytree.tree_map_only(torch.Tensor, lambda x: x * factor if x.is_floating_point() else x, arguments)


def members_of(name, num_members=3):
    make, arguments = NETWORKS[name]
    return [randomised(make, seed) for seed in range(num_members)], arguments


@pytest.mark.parametrize("name", NETWORKS)
def test_plans_give_what_the_members_give(name):
    members, arguments = members_of(name)
    ensemble = fastens.Ensemble(members, engine="fold")
    for batch in (1, 3):
        for factor in (1.0, 0.7, -1.3, 0.2):  # checked, recorded, planned, planned
            args, kwargs = scaled(arguments(batch), factor)
            with torch.no_grad():
                expected = torch.stack([tensor_of(member(*args, **kwargs)) for member in members])
                outputs = ensemble.member_outputs(*args, **kwargs)
            outputs = outputs[0] if isinstance(outputs, tuple) else outputs
            assert relative_error(outputs, expected) < NETWORK[torch.float32]
    assert len(ensemble.report().plans) > 0, ensemble.report().why_no_plan


DRAWS = [(0, 1, 2, 1), (2, 2, 0, 0), (1, 1, 1, 1), (2, 0, 2, 0)]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("batch", [1, 4])
def test_one_plan_serves_every_draw(name, batch, monkeypatch):
    members, arguments = members_of(name)
    ensemble = fastens.Ensemble(members, "alternating", engine="fold")
    for i, draw in enumerate(DRAWS):  # recorded, then planned
        drawn = torch.tensor(draw[:batch])
        monkeypatch.setattr(ensemble._draws, "members", lambda *_, drawn=drawn: drawn)
        args, kwargs = scaled(arguments(batch), 1.0 - 0.4 * i)
        with torch.no_grad():
            output = tensor_of(ensemble(*args, **kwargs))
            stack = torch.stack([tensor_of(member(*args, **kwargs)) for member in members])
        batch_dim = stack.shape.index(batch, 1) - 1
        chosen = [stack[k].select(batch_dim, row) for row, k in enumerate(drawn.tolist())]
        assert relative_error(output, torch.stack(chosen, batch_dim)) < NETWORK[torch.float32]
    assert len(ensemble.report().plans) == 1, ensemble.report().why_no_plan


@pytest.mark.parametrize("rule", ["alternating", "mixture"])
def test_a_draw_gives_the_same_in_every_evaluation(rule):
    """The first evaluation of a signature is the plan's as well; so trajectories repeat to the bit."""
    members, arguments = members_of("unet_2d", 3)
    (args, kwargs), results = arguments(5), []
    ensemble = fastens.Ensemble(members, rule)
    for _ in range(3):
        with torch.no_grad(), ensemble.trajectory(5, generator=7):
            results.append(torch.stack([tensor_of(ensemble(*args, **kwargs)) for _ in range(3)]))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[1], results[2])
    assert torch.equal(results[0][0], results[0][1]) == (rule == "mixture")


def test_drawn_masks_are_planned():
    network = nn.Sequential(nn.Linear(4, 16), nn.SiLU(), nn.Dropout(0.5), nn.Linear(16, 4))
    dropout = fastens.MCDropout(network, 3, "alternating")
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        stack = torch.stack([member(x) for member in dropout.members])
        for seed in range(4):
            with dropout.trajectory(6, generator=seed):
                output = dropout(x)
            nearest = (output - stack).abs().amax(-1).min(0)
            assert nearest.values.max() < 1e-5
            assert len(set(nearest.indices.tolist())) > 1
    assert dropout.report().plans


def planned_unet():
    members, arguments = members_of("unet_2d", 2)
    ensemble = fastens.Ensemble(members)
    args, _ = arguments(2)
    with torch.no_grad():
        for _ in range(3):
            ensemble(*args)
    assert ensemble.report().plans
    return ensemble, args


def test_a_residual_block_is_two_convolutions_and_two_norms():
    ensemble, _ = planned_unet()
    (plan,) = ensemble.report().plans
    blocks = 7  # of the network: each two convolutions, two norms, one projection of the time embedding
    assert plan["Norm"] == 2 * blocks + 3
    assert not [kind for kind in plan if kind.startswith(("aten.silu", "aten.add", "aten.cat", "aten.convolution"))]


def test_the_report_tells_what_plans_are():
    ensemble, _ = planned_unet()
    report = ensemble.report()
    assert report.target == target()
    assert f"plans run on {target()}; bfloat16 is multiplied" in str(report)
    assert report.plan_bytes > sum(p.numel() * 4 for p in ensemble.parameters())


def test_results_are_the_callers():
    ensemble, args = planned_unet()
    with torch.no_grad():
        first = ensemble(*args).sample
        kept = first.clone()
        first.fill_(float("nan"))
        assert torch.equal(ensemble(*args).sample, kept)


@pytest.mark.parametrize("change", ["copy_", "load_state_dict", "optimizer", "double"])
def test_changed_weights_are_seen(change):
    ensemble, args = planned_unet()
    if change == "copy_":
        with torch.no_grad():
            next(ensemble.parameters()).mul_(1.5)
    elif change == "load_state_dict":
        ensemble.load_state_dict({name: 0.9 * t for name, t in ensemble.state_dict().items()})
    elif change == "optimizer":
        optimizer = torch.optim.SGD(ensemble.parameters(), 0.1)
        ensemble(*args).sample.square().mean().backward()
        optimizer.step()
    else:
        ensemble.double()
        args = (args[0].double(), args[1])
    with torch.no_grad():
        loop = torch.stack([member(*args).sample for member in ensemble.members]).mean(0)
        for _ in range(3):
            assert relative_error(ensemble(*args).sample, loop) < NETWORK[torch.float32]


def test_a_write_behind_torch_needs_a_refresh():
    ensemble, args = planned_unet()
    next(ensemble.parameters()).data.mul_(2.0)
    ensemble.refresh()
    with torch.no_grad():
        loop = torch.stack([member(*args).sample for member in ensemble.members]).mean(0)
        for _ in range(3):
            assert relative_error(ensemble(*args).sample, loop) < NETWORK[torch.float32]


def test_gradients_and_training_read_the_stacks():
    ensemble, args = planned_unet()
    x = args[0].clone().requires_grad_()
    ensemble(x, args[1]).sample.sum().backward()
    assert x.grad is not None


def test_hooks_are_called():
    ensemble, args = planned_unet()
    called = []
    handle = ensemble.network.conv_out.register_forward_hook(lambda *_: called.append(1))
    with torch.no_grad():
        hooked = ensemble(*args).sample
        assert called
        handle.remove()
        called.clear()
        assert relative_error(ensemble(*args).sample, hooked) < NETWORK[torch.float32]
    assert not called


class Tricky(nn.Module):
    """Control flow and memory that a recording must not get wrong."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.layer = nn.Linear(4, 4)
        self.register_buffer("levels", torch.linspace(0.1, 1, 4, dtype=torch.float64))

    def forward(self, x, scale=1.0):
        if self.kind == "float64 table":
            return self.layer((x * self.levels + self.levels[1]).to(x.dtype))
        if self.kind == "branch" and x.mean() > 0:
            x = -x
        if self.kind == "noise":
            return self.layer(x) + torch.rand(())
        if self.kind == "in place":
            h = self.layer(x)
            kept = h + 1
            h.mul_(2).add_(x)
            h[:, :2] = 0
            return kept * h
        return self.layer(x) * scale


def follow_the_members(kind, calls):
    """An ensemble of networks that are hard to record, after calls whose results were the members'."""
    members = [Tricky(kind).eval() for _ in range(3)]
    ensemble = fastens.Ensemble(members)
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for i in range(calls):
            arguments = (x * (-1) ** i * (i + 1), *((float(i),) if kind == "number" else ()))
            expected = torch.stack([member(*arguments) for member in members]).mean(0)
            assert relative_error(ensemble(*arguments), expected) < NETWORK[torch.float32]
    return ensemble


@pytest.mark.parametrize("kind", ["branch", "in place", "number", "float64 table"])
def test_tricky_networks(kind):
    ensemble = follow_the_members(kind, calls=8)
    assert bool(ensemble.report().plans) == (kind != "branch")
    if kind == "branch":
        assert "values of the input" in ensemble.report().why_no_plan


def test_random_networks_have_no_plan():
    ensemble = fastens.Ensemble([Tricky("noise").eval() for _ in range(2)], engine="fold")
    x = torch.ones(2, 4)
    with torch.no_grad():
        outputs = [ensemble(x) for _ in range(5)]
    assert not torch.equal(outputs[-1], outputs[-2])
    assert "random" in ensemble.report().why_no_plan


def test_threads_share_a_plan():
    ensemble, (x, t) = planned_unet()
    with torch.no_grad():
        expected = [ensemble(x * i, t).sample for i in range(6)]
    results = [None] * 6

    def work(i):
        with torch.no_grad():
            results[i] = ensemble(x * i, t).sample

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result, wanted in zip(results, expected, strict=True):
        assert torch.equal(result, wanted)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_poisoned_sample_stays_alone(poison):
    ensemble, (x, t) = planned_unet()
    with torch.no_grad():
        clean = ensemble(x, t).sample
        dirty = x.clone()
        dirty[0, 0, 0, 0] = poison
        result = ensemble(dirty, t).sample
    assert result[0].isnan().any()
    assert torch.equal(result[1], clean[1])


def test_networks_in_one_dimension_are_steps():
    members, arguments = members_of("unet_1d", 2)
    ensemble = fastens.Ensemble(members)
    with torch.no_grad():
        ensemble(*arguments(2)[0])
    (plan,) = ensemble.report().plans
    assert plan["Attention"] == 12
    assert not [kind for kind in plan if kind.startswith("fastens.") or "bmm" in kind or "softmax" in kind]


class Modulated(nn.Module):
    """Scale and shift of a normalisation from an embedding, as EDM's blocks write it."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.inner, self.outer = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)
        self.norm, self.affine = nn.GroupNorm(4, 16), nn.Linear(4, 32)

    def forward(self, x, emb):
        h = self.inner(x)
        scale, shift = self.affine(emb)[:, :, None, None].chunk(2, dim=1)
        if self.kind == "by row":
            return self.outer(torch.addcmul(shift, self.norm(h), scale + 1))
        if self.kind == "used twice":
            y = self.norm(h)
            return self.outer(torch.addcmul(shift, y, scale + 1) * y)
        if self.kind == "by pixel":
            return self.outer(torch.addcmul(h, self.norm(h), scale + 1))
        return self.outer(torch.addcmul(shift, self.norm(h), scale, value=2))


@pytest.mark.parametrize("kind", ["by row", "used twice", "by pixel", "with a factor"])
def test_addcmul(kind):
    members = [randomised(lambda: Modulated(kind), seed) for seed in range(3)]
    ensemble = fastens.Ensemble(members, engine="fold")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(2):
            x, emb = torch.randn(2, 3, 6, 6, generator=generator), torch.randn(2, 4, generator=generator)
            expected = torch.stack([member(x, emb) for member in members])
            assert relative_error(ensemble.member_outputs(x, emb), expected) < NETWORK[torch.float32]
    (plan,) = ensemble.report().plans
    assert ("aten.addcmul.default" in plan) == (kind == "with a factor")
    if kind == "by row":
        assert plan["Pointwise"] <= 4  # the inputs, in rows and then in channels, and the output
