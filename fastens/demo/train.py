"""Train the demo's members: ``python -m fastens.demo.train --data digits --out DIR``.

All members are trained at once by :func:`fastens.training.training_step`, each as if alone; ``--separate`` trains one
after the other, which is how the shipped ones were made. Each member is a small diffusers ``UNet2DModel`` that predicts
the noise of the DDPM process with linear betas (arXiv 2006.11239), from its own seed; its exponential moving average is
what is kept.
"""

import argparse
import contextlib
import functools
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastens.demo import members_folder
from fastens.demo.data import LOADERS
from fastens.ensemble import Ensemble
from fastens.files import write_json
from fastens.modes import evaluating, in_mode
from fastens.training import training_step

MODEL = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": (20, 40),
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "add_attention": False,
}
PHOTOGRAPHS_MODEL = {
    **MODEL,
    "sample_size": 16,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("DownBlock2D",) * 3,
    "up_block_types": ("UpBlock2D",) * 3,
}
MODELS: dict[str, dict[str, Any]] = {"digits": MODEL, "photographs": PHOTOGRAPHS_MODEL}
BATCH = 64
LEARNING_RATE = 2e-3
EMA_DECAY = 0.999
CLIP = 1.0  # of each member's gradient norm


def make_scheduler() -> Any:
    """The noise schedule of training and sampling: beta 1e-4 to 0.02 in 1000 steps."""
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    return DDPMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")


def noisy_batch(images: Tensor, scheduler: Any, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one batch: noisy images and their noise, both [64, C, H, W], and noise levels [64]."""
    clean = images[torch.randint(len(images), (BATCH,), generator=generator)]
    t = torch.randint(1000, (BATCH,), generator=generator)
    noise = torch.randn(clean.shape, generator=generator)
    return scheduler.add_noise(clean, noise, t), t, noise


def new_member(seed: int, model: dict[str, Any]) -> Any:
    """A member of a configuration with the initial weights of its seed."""
    from diffusers.models.unets.unet_2d import UNet2DModel

    torch.manual_seed(seed)
    return UNet2DModel(**model)


def train_together(
    images: Tensor, steps: int, seeds: list[int], progress: Any, model: dict[str, Any] = MODEL
) -> list[tuple[Any, list[float]]]:
    """Train all members at once: one folded forward and backward pass for each step of all.

    Args:
        images: [N, C, H, W] in [-1, 1].
        steps: optimiser steps with batches of 64 for each member.
        seeds: one per member, of its initial weights, batches, noise levels and noise.
        progress: told of each member's steps.
        model: the networks' configuration.

    Returns:
        For each member its model with averaged weights, and its mean loss of every hundred steps.
    """
    ensemble = in_mode(Ensemble([new_member(seed, model) for seed in seeds], engine="fold"), True)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    scheduler = make_scheduler()

    def step(optimizer: Any) -> Tensor:
        batches = [noisy_batch(images, scheduler, generator) for generator in generators]
        noisy, t, noise = (torch.stack(part) for part in zip(*batches, strict=True))
        return training_step(
            ensemble, optimizer, lambda predicted: (predicted - noise).square(), noisy, t, max_norm=CLIP
        )

    losses = optimise(list(ensemble.parameters()), steps, step, progress)
    columns = [[round(value, 6) for value in column] for column in torch.stack(losses).T.tolist()]
    return [(evaluating(member), column) for member, column in zip(ensemble.members, columns, strict=True)]


def train_member(
    images: Tensor, steps: int, seed: int, progress: Any, model: dict[str, Any] = MODEL
) -> tuple[Any, list[float]]:
    """Train one member alone; arguments and result as for :func:`train_together`."""
    generator = torch.Generator().manual_seed(seed)
    network = new_member(seed, model)
    scheduler = make_scheduler()

    def step(optimizer: Any) -> Tensor:
        noisy, t, noise = noisy_batch(images, scheduler, generator)
        loss = torch.nn.functional.mse_loss(network(noisy, t).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        optimizer.step()
        return loss.detach()

    losses = optimise(list(network.parameters()), steps, step, progress)
    return evaluating(network), [round(float(value), 6) for value in losses]


def optimise(parameters: list[Any], steps: int, step: Callable[[Any], Tensor], progress: Any) -> list[Tensor]:
    """Take ``step`` after ``step`` with AdamW and put the moving averages in the parameters' place.

    Returns:
        The mean over every hundred steps of what ``step`` returned.
    """
    from diffusers.training_utils import EMAModel

    average = EMAModel(parameters, decay=EMA_DECAY, use_ema_warmup=True, power=0.75)
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.05)
    losses, recent = [], torch.zeros(())
    for number in range(1, steps + 1):
        loss = step(optimizer)
        schedule.step()
        average.step(parameters)
        recent = recent + loss
        if number % 100 == 0 or number == steps:
            losses.append(recent / (number % 100 or 100))
            recent = torch.zeros(())
            progress.set_postfix(loss=f"{float(losses[-1].mean()):.6f}")
        progress.update(loss.numel())
    average.copy_to(parameters)
    return losses


@torch.no_grad()
def noise_predictions(model: Any, images: Tensor, draws: int = 10) -> tuple[Tensor, Tensor]:
    """Noise and its prediction at ``draws`` fixed noise levels per image, both [draws * N, C, H, W]."""
    generator = torch.Generator().manual_seed(1)
    clean = images.repeat(draws, 1, 1, 1)
    t = torch.randint(1000, (len(clean),), generator=generator)
    noise = torch.randn(clean.shape, generator=generator)
    noisy = make_scheduler().add_noise(clean, noise, t)
    parts = [model(x, s).sample for x, s in zip(noisy.split(500), t.split(500), strict=True)]
    return noise, torch.cat(parts)


def _earlier(out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What an earlier run with the same settings wrote of the members asked for."""
    if not (out / "training.json").exists():
        return {"members": [], "seconds": 0}
    log = json.loads((out / "training.json").read_text())
    seeds = [member["seed"] for member in log["members"]]
    if log.get("steps") != options.steps or seeds != [options.seed + k for k in range(len(seeds))]:
        raise ValueError(f"{out / 'training.json'} is of other seeds or steps; choose another --out, or drop --resume")
    log["members"] = log["members"][: options.members]
    return log


@contextlib.contextmanager
def _deterministic_algorithms() -> Iterator[None]:
    """Scope in which torch takes deterministic algorithms only; the caller's choice holds again after it."""
    before = torch.get_deterministic_debug_mode()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


@_deterministic_algorithms()
def main(argv: list[str] | None = None) -> None:
    """Train K members and write their folders and ``training.json``."""
    parser = argparse.ArgumentParser(prog="python -m fastens.demo.train", description=__doc__)
    parser.add_argument("--data", choices=list(LOADERS), default="digits", help="which images")
    parser.add_argument("--out", type=Path, help="where the folders go; default: beside the shipped members' code")
    parser.add_argument("--members", type=int, default=5, help="how many members")
    parser.add_argument("--steps", type=int, default=2500, help="optimiser steps of each member")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first member; the others follow")
    parser.add_argument("--dropout", type=float, default=0.0, help="probability of the dropout in residual blocks")
    parser.add_argument("--resume", action="store_true", help="keep members that training.json in --out has already")
    parser.add_argument(
        "--separate", action="store_true", help="train one member after the other, as the shipped ones were"
    )
    options = parser.parse_args(argv)

    import diffusers
    from diffusers.models.unets.unet_2d import UNet2DModel
    from tqdm import tqdm

    out = options.out or members_folder(options.data)
    train, test = LOADERS[options.data]()
    started = time.perf_counter()
    earlier = _earlier(out, options) if options.resume else {"members": [], "seconds": 0}
    members, predictions, noise = [], [], torch.empty(0)
    seeds = [options.seed + k for k in range(options.members)]
    with tqdm(total=options.members * options.steps, unit="step") as progress:
        kept = len(earlier["members"])
        progress.update(kept * options.steps)
        load = functools.partial(UNet2DModel.from_pretrained, low_cpu_mem_usage=False)
        trained = [(load(out / f"member_{k}"), earlier["members"][k]["training_loss"]) for k in range(kept)]
        model = {**MODELS[options.data], "dropout": options.dropout}
        if options.separate:
            trained += [train_member(train, options.steps, seed, progress, model) for seed in seeds[kept:]]
        elif seeds[kept:]:
            trained += train_together(train, options.steps, seeds[kept:], progress, model)
    seconds = time.perf_counter() - started
    if not options.resume:
        (out / "training.json").unlink(missing_ok=True)  # it vouches for the folders beside it, which change now
    for k, (member, losses) in enumerate(trained):
        if k >= kept:
            member.save_pretrained(out / f"member_{k}")
        noise, predicted = noise_predictions(member, test)
        predictions.append(predicted)
        loss = float((predicted - noise).square().mean())
        members.append({"seed": seeds[k], "test_loss": round(loss, 6), "training_loss": losses})
    ensemble = float((torch.stack(predictions).mean(0) - noise).square().mean())
    arguments = argv if argv is not None else sys.argv[1:]
    log = {
        "command": shlex.join(["python", "-m", "fastens.demo.train", *arguments]),
        "data": f"scikit-learn {options.data}, {len(train)} training and {len(test)} test images, scaled to [-1, 1]",
        "steps": options.steps,
        "loss": "noise prediction, mean squared error; test: 10 fixed noise levels per image",
        "member_mean_test_loss": round(sum(m["test_loss"] for m in members) / len(members), 6),
        "mean_ensemble_test_loss": round(ensemble, 6),
        "seconds": round(seconds + earlier["seconds"]),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "members": members,
    }
    write_json(out / "training.json", log)
    print(
        f"wrote {options.members} members and training.json to {out}; test loss of the members "
        f"{log['member_mean_test_loss']:.5f} on average, of their mean {ensemble:.5f}"
    )


if __name__ == "__main__":
    main()
