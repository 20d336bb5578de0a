"""How many launches the parts of a score network are: what is before and behind a convolution is part of it."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastens
from fastens.engine import planned
from tests.fold.test_launches import HALF, plan_of
from tests.networks import randomised
from tests.ops.cases import interpreted
from tests.tolerances import NETWORK, relative_error


@pytest.fixture(autouse=True)
def _launches(monkeypatch):
    monkeypatch.setattr(planned, "launches_on", lambda _: True)


class Block(nn.Module):
    def __init__(self, inputs, outputs, scaled=False):
        super().__init__()
        self.norms = nn.ModuleList([nn.GroupNorm(4, inputs), nn.GroupNorm(4, outputs)])
        self.convs = nn.ModuleList(
            [nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)]
        )
        self.project = nn.Linear(8, outputs * (1 + scaled))
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.scaled = scaled

    def forward(self, x, embedding):
        h = self.convs[0](F.silu(self.norms[0](x)))
        of_time = self.project(F.silu(embedding))[:, :, None, None]
        if self.scaled:
            scale, shift = of_time.chunk(2, 1)
            h = F.silu(self.norms[1](h) * (1 + scale) + shift)
        else:
            h = F.silu(self.norms[1](h + of_time))
        return (self.shortcut(x) + self.convs[1](h)) * 0.5**0.5


class Attention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(4, channels)
        self.q, self.k, self.v, self.project = (nn.Linear(channels, channels) for _ in range(4))

    def forward(self, x):
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = (f(tokens).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return (x + self.project(y).transpose(1, 2).unflatten(-1, x.shape[2:])) * 2**-0.5


class Network(nn.Module):
    def __init__(self, scaled=False, attention=False, skip=False):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)
        self.embed = nn.Linear(4, 8)
        self.register_buffer("frequencies", torch.arange(1.0, 5.0))
        self.blocks = nn.ModuleList([Block(16, 16, scaled), Block(16, 16, scaled)])
        self.attention = Attention(16) if attention else nn.Identity()
        self.up = nn.ModuleList([Block(16 + 8, 16, scaled)]) if skip else nn.ModuleList()
        self.narrow = nn.Conv2d(16, 8, 3, padding=1) if skip else None

    def forward(self, x, t):
        embedding = self.embed(torch.sin(t[:, None] * self.frequencies.to(t.dtype)))
        x = self.first(x)
        narrow = self.narrow(x) if self.narrow is not None else None
        x = self.blocks[0](x, embedding)
        x = self.blocks[1](self.attention(x), embedding)
        for block in self.up:
            x = block(torch.cat([x, narrow], 1), embedding)
        return self.last(x)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("scaled", [False, True], ids=["shifted", "scaled and shifted"])
@pytest.mark.parametrize(
    ("parts", "launches"),
    [
        ({}, {"conv2d": 2 + 2 * 2}),
        ({"attention": True}, {"conv2d": 2 + 2 * 2 + 2, "attention": 1}),  # q, k and v; the projection
        ({"skip": True}, {"conv2d": 2 + 2 * 2 + 1 + 2 + 1}),  # the skip; a block of 24 channels and its shortcut
    ],
    ids=["blocks", "attention", "skip"],
)
def test_launches_of_a_score_network(parts, launches, scaled, batch):
    members = [randomised(lambda: Network(scaled, **parts), seed) for seed in range(3)]
    ensemble = fastens.Ensemble(members, engine="fold")
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        x, t = torch.randn(batch, 3, 16, 16, generator=generator), torch.rand(batch, generator=generator)
        with torch.no_grad():
            outputs, mean = ensemble.member_outputs(x, t), ensemble(x, t)
            expected = torch.stack([member(x, t) for member in members])
        assert relative_error(outputs, expected) < NETWORK[torch.float32]
        assert relative_error(mean, expected.mean(0)) < NETWORK[torch.float32]
    plan = plan_of(ensemble)
    # the embedding of what all members share, its first layer, which reads it once, and its projections for all blocks
    assert plan.kinds == {"pointwise": 1, "linear group": 1, **launches, "conv2d": launches["conv2d"] + 1}
    assert plan.sums
    first, *others = [launch for launch in plan._launches if launch.name == "conv2d"]
    assert first.block.shared
    assert first.block.x.size[0] == batch
    for launch in others:  # as the kernels read them, without a copy
        before, behind = launch.block.prologue, launch.block.epilogue
        vectors = [vector for vector in (behind.row_bias, before.scale, before.shift) if vector is not None]
        assert all(vector.stride == (vector.size[1], 1) for vector in vectors)
        assert launch.block.x.is_dense()


def test_stacks_of_layers_that_became_one_are_kept_once_and_counted():
    members = [randomised(lambda: Network(attention=True), seed) for seed in range(2)]
    ensemble = fastens.Ensemble(members, engine="fold")
    plans, seen = ensemble._engine.plans, []
    for batch in (1, 2):
        with torch.no_grad():
            ensemble(torch.randn(batch, 3, 8, 8), torch.rand(batch))
        seen.append(plans._kept.num_bytes)
    assert len(plans) == 2
    assert seen[0] == seen[1] >= 2 * 4 * 3 * (16 * 16 + 16)


def test_images_of_inputs_come_in_as_they_are_read():
    members = [randomised(Network, seed).bfloat16() for seed in range(2)]
    ensemble = fastens.Ensemble(members, engine="fold")
    x, t = torch.randn(2, 3, 8, 8), torch.rand(2)
    with torch.no_grad():
        ensemble(x.bfloat16(), t.bfloat16())
    inputs = dict(plan_of(ensemble)._bound.inputs)
    assert inputs[0].is_contiguous(memory_format=torch.channels_last)
    assert inputs[0].shape == x.shape
    assert set(plan_of(ensemble).kinds) == {"pointwise", "linear group", "conv2d"}


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, pytest.param(torch.float32, marks=interpreted), pytest.param(torch.float16, marks=interpreted)],
)
def test_the_kernels_of_all_parts(dtype):
    pytest.importorskip("triton")
    members = [randomised(lambda: Network(True, attention=True, skip=True), seed) for seed in range(2)]
    generator = torch.Generator().manual_seed(2)
    x, t = torch.randn(2, 3, 6, 6, generator=generator).to(dtype), torch.rand(2, generator=generator).to(dtype)
    with torch.no_grad():
        expected = torch.stack([member(x.float(), t.float()) for member in members])
        ensemble = fastens.Ensemble([member.to(dtype) for member in members], backend="triton")
        outputs, mean = ensemble.member_outputs(x, t), ensemble(x, t)
    assert ensemble.report().plans, ensemble.report().why_no_plan
    bound = (NETWORK | HALF)[dtype]
    assert relative_error(outputs, expected) < bound
    assert relative_error(mean, expected.mean(0)) < bound


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_rows_that_are_dealt_out(backend, monkeypatch):
    """One plan for all draws, whatever member each row goes to."""
    if backend == "triton":
        pytest.importorskip("triton")
    members = [randomised(lambda: Network(True, attention=True, skip=True), seed) for seed in range(2)]
    ensemble = fastens.Ensemble(members, "alternating", engine="fold", backend=backend)
    x, t = torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(3)), torch.rand(3)
    with torch.no_grad():
        stack = torch.stack([member(x, t) for member in members])
        for drawn in (torch.tensor([0, 1, 0]), torch.tensor([1, 1, 1]), torch.tensor([1, 0, 0])):
            monkeypatch.setattr(ensemble._draws, "members", lambda *_, drawn=drawn: drawn)
            expected = stack[drawn, torch.arange(3)]
            assert relative_error(ensemble(x, t), expected) < NETWORK[torch.float32]
    assert len(ensemble.report().plans) == 1, ensemble.report().why_no_plan
    assert not plan_of(ensemble).sums


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 40, 3, padding=1), nn.Conv2d(40, 3, 3, padding=1)
        self.norm, self.parting, self.drop = nn.GroupNorm(4, 40), nn.Dropout(0.1), nn.Dropout(0.3)

    def forward(self, x):
        return self.last(self.drop(F.silu(self.norm(self.first(self.parting(x))))))


@pytest.mark.parametrize(
    ("backend", "rule", "masks"),
    [
        *itertools.product(["auto"], ["mean", "alternating"], ["fixed", "fresh"]),
        ("triton", "mean", "fresh"),
        ("triton", "alternating", "fixed"),
    ],
)
def test_masks_are_part_of_the_convolution_behind(backend, rule, masks):
    if backend == "triton":
        pytest.importorskip("triton")
    network, x = randomised(Dropping, 0), torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(4))
    ours, loop = (
        fastens.MCDropout(network, 3, rule, masks=masks, seed=5, engine=engine, backend=name)
        for engine, name in (("fold", backend), ("loop", "auto"))
    )
    with torch.no_grad(), ours.trajectory(4, 0), loop.trajectory(4, 0):
        for factor in (1.0, 0.5):
            assert relative_error(ours(factor * x), loop(factor * x)) < NETWORK[torch.float32]
    (plan,) = ours.report().plans
    assert plan["conv2d"] == 2, ours.report().why_no_plan
    assert plan.get("draw", 0) == (2 if masks == "fresh" else 0)
    assert "group norm" not in plan  # it is part of the convolution behind, and so is the mask there
    assert plan.get("masked", 0) <= 1  # where the members part


class Written(nn.Module):
    """Copies an image, and then changes a part of it."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1)

    def forward(self, x):
        x = self.first(x).clone()
        before = x * 1.0
        x[:, :2] = 0.0 * x[:, :2]
        return self.last(before), before.clone(), x


class Joining(nn.Module):
    """A linear layer of two joined images, with nothing behind it."""

    def __init__(self):
        super().__init__()
        self.parts, self.both = nn.ModuleList([nn.Conv2d(3, 8, 3, padding=1) for _ in range(2)]), nn.Conv2d(16, 3, 1)

    def forward(self, x):
        return torch.exp(self.both(torch.cat([part(x) for part in self.parts], 1)))


@pytest.mark.parametrize("network", [Written, Joining])
def test_what_is_written_twice_or_joined_keeps_its_values(network):
    members = [randomised(network, seed) for seed in range(2)]
    ensemble = fastens.Ensemble(members, engine="fold")
    for seed in range(2):
        x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            outputs = ensemble.member_outputs(x)
            single = not isinstance(outputs, tuple)
            for k, member in enumerate(members):
                pairs = zip([outputs] if single else outputs, [member(x)] if single else member(x), strict=True)
                for ours, theirs in pairs:
                    assert relative_error(ours[k], theirs) < NETWORK[torch.float32]
    assert ensemble.report().plans, ensemble.report().why_no_plan


class SharedNorm(nn.Module):
    """A norm whose scale is the same in all members, before a convolution of each member's own."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.register_buffer("scale", torch.linspace(0.5, 2, 8))

    def forward(self, x):
        return self.last(F.silu(F.group_norm(self.first(x), 2, self.scale, self.scale)))


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_a_norm_that_all_members_share_is_read_by_each(backend):
    if backend == "triton":
        pytest.importorskip("triton")
    members, x = [randomised(SharedNorm, k) for k in range(3)], torch.randn(2, 3, 5, 5)
    for member in members:
        member.scale.copy_(torch.linspace(0.5, 2, 8))
    ensemble = fastens.Ensemble(members, backend=backend)
    with torch.no_grad():
        found, expected = ensemble(x), torch.stack([member(x) for member in members]).mean(0)
    assert relative_error(found, expected) < NETWORK[torch.float32]
    assert ensemble.report().plans, ensemble.report().why_no_plan
