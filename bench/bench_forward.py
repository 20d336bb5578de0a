"""C2, C3, C4: one folded forward of K U-Nets against loops over the members, vmap and compilers; time against K and B.

Each test is a part by itself: ``fastens bench --only "test_eager and C3"``.
"""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastens
from bench.contest import Contender, contest
from fastens.demo import member_paths
from fastens.demo.train import MODEL

K = 5
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def digits_members(count: int = K) -> list[nn.Module]:
    """The demo's U-Net; beyond its five members they come again."""
    paths = member_paths()
    return list(fastens.Ensemble([paths[k % len(paths)] for k in range(count)]).members)


def small_members(count: int = K) -> list[nn.Module]:
    """A small U-Net of diffusers' blocks."""
    return _unets(
        count,
        sample_size=16,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(32, 64),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def song_sized_members(count: int = K) -> list[nn.Module]:
    """As many channels and blocks as EDM's SongUNet at 32x32, about 56 million parameters, in diffusers' blocks."""
    return _unets(
        count,
        sample_size=32,
        layers_per_block=4,
        block_out_channels=(256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=256,
    )


def _unets(count: int, **config: object) -> list[nn.Module]:
    from diffusers import UNet2DModel

    members = []
    for seed in range(count):
        torch.manual_seed(seed)
        members.append(UNet2DModel(**config).eval())  # pyright: ignore[reportArgumentType]
    return members


@dataclasses.dataclass(frozen=True)
class Network:
    """What a goal is about: its members, and the size of a sample."""

    members: Callable[[int], list[nn.Module]]
    channels: int
    size: int
    rounds: dict[int, int]  # by batch


NETWORKS = {
    "C2": Network(digits_members, 1, MODEL["sample_size"], {1: 20, 4: 20, 16: 20, 64: 20}),
    "C3": Network(small_members, 3, 16, {1: 20, 4: 20, 16: 20, 64: 10}),
    "C4": Network(song_sized_members, 3, 32, {1: 5, 4: 5, 16: 2, 64: 1}),
}
EAGER, COMPILED = "eager loop", "compiled loop"
WANTED = {
    ("C2", 1): {EAGER: 10, COMPILED: 5},
    ("C3", 1): {EAGER: 4, COMPILED: 1.2},
    ("C3", 4): {EAGER: 2.5, COMPILED: 1.2},
    ("C3", 16): {EAGER: 1.6, COMPILED: 1.2},
    ("C3", 64): {EAGER: 1.6, COMPILED: 1.2},
    **{("C4", batch): {EAGER: 1.35} for batch in (1, 4, 16, 64)},
}


def loop_of(models, x: Tensor, t: Tensor) -> Contender:
    return lambda: torch.stack([model(x, t).sample for model in models]).mean(0)


def compiled_rivals(members, x: Tensor, t: Tensor) -> dict[str, Contender]:
    """The loop over compiled members, which share one graph, and a compiled fold of torch's own operations."""
    plain = fastens.Ensemble(members, engine="fold", backend="reference")
    fold = torch.compile(lambda x, t: plain(x, t).sample, dynamic=False)
    models = [torch.compile(member, dynamic=False) for member in members]
    return {COMPILED: loop_of(models, x, t), "compiled fold of torch's operations": lambda: fold(x, t)}


def vmapped(members, x: Tensor, t: Tensor) -> dict[str, Contender]:
    """The stacked members under vmap, where that runs."""
    parameters, buffers = torch.func.stack_module_state(members)

    def one(p, b, x):
        return torch.func.functional_call(members[0], (p, b), (x, t)).sample

    run = torch.vmap(one, in_dims=(0, 0, None))
    try:
        run(parameters, buffers, x)
    except RuntimeError:
        return {}
    return {"vmap": lambda: run(parameters, buffers, x).mean(0)}


def forward(benchmark, goal: str, batch: int, rivals, count: int = K, dtype: torch.dtype = torch.float32) -> None:
    """Time ours beside ``rivals(members, x, t)``."""
    network = NETWORKS[goal]
    members = [member.to(dtype) for member in network.members(count)]
    shape = (batch, network.channels, network.size, network.size)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    t = torch.full((batch,), 500)
    ensemble = fastens.Ensemble(members)
    with torch.no_grad():
        expected = torch.zeros(shape, dtype=torch.float64)
        for member in members:
            expected += member.float()(x.float(), t).sample.double() / count
            member.to(dtype)
        contenders = rivals(members, x, t)
        weights = sum(p.numel() * p.element_size() for p in ensemble.parameters())
        name = str(dtype).removeprefix("torch.")
        contest(
            benchmark,
            lambda: ensemble(x, t).sample,
            contenders,
            expected,
            TOLERANCES[dtype],
            goal,
            f"{goal} forward in {name}, K = {count}, batch {batch}",
            f"K={count}, B={batch}, {network.size}x{network.size}, "
            f"{sum(p.numel() for p in members[0].parameters()):,} parameters, {name}",
            WANTED.get((goal, batch)) if count == K and dtype == torch.float32 else None,
            rounds=network.rounds[batch],
            warmup_rounds=0 if network.rounds[batch] < 5 else 2,
            held={"ours": lambda: weights + ensemble.report().plan_bytes, **dict.fromkeys(contenders, lambda: weights)},
            scale={"network": goal, "K": count, "B": batch, "dtype": name},
        )


@pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("batch", [1, 4, 16, 64])
@pytest.mark.parametrize("goal", NETWORKS)
def test_eager(benchmark, goal, batch, dtype):
    forward(benchmark, goal, batch, lambda members, x, t: {EAGER: loop_of(members, x, t)}, dtype=dtype)


@pytest.mark.parametrize("batch", [1, 4, 16, 64])
@pytest.mark.parametrize("goal", ["C2", "C3"])
def test_vmap(benchmark, goal, batch):
    forward(benchmark, goal, batch, vmapped)


@pytest.mark.parametrize("batch", [1, 4, 16, 64])
@pytest.mark.parametrize("goal", NETWORKS)
def test_compiled(benchmark, goal, batch):
    """Compiling takes the most of it: tens of seconds for a network."""
    torch._dynamo.reset()
    forward(benchmark, goal, batch, compiled_rivals)


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 12, 16])
@pytest.mark.parametrize("goal", ["C2", "C3"])
def test_members(benchmark, goal, count, batch):
    """Time against the number of members."""
    forward(benchmark, goal, batch, lambda members, x, t: {EAGER: loop_of(members, x, t)}, count)
