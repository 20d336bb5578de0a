"""Train the demo's members: ``python -m fastens.demo.train --data digits --out DIR``.

Each member is a small diffusers ``UNet2DModel`` that predicts the noise of the DDPM process with linear betas
(arXiv 2006.11239), from its own seed; its exponential moving average is what is kept.
"""

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastens.demo import members_folder
from fastens.demo.data import LOADERS

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


def make_scheduler() -> Any:
    """The noise schedule of training and sampling: beta 1e-4 to 0.02 in 1000 steps."""
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    return DDPMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")


def train_member(
    images: Tensor, steps: int, seed: int, progress: Any, model: dict[str, Any] = MODEL
) -> tuple[Any, list[float]]:
    """Train one member.

    Args:
        images: [N, C, H, W] in [-1, 1].
        steps: optimiser steps with batches of 64.
        seed: of initial weights, batches, noise levels and noise.
        progress: told of each step.
        model: the network's configuration.

    Returns:
        The model with its averaged weights, and the mean loss of every hundred steps.
    """
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.training_utils import EMAModel

    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = UNet2DModel(**model)
    average = EMAModel(network.parameters(), decay=EMA_DECAY, use_ema_warmup=True, power=0.75)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.05)
    scheduler = make_scheduler()
    losses, recent = [], torch.zeros(())
    for step in range(1, steps + 1):
        clean = images[torch.randint(len(images), (BATCH,), generator=generator)]
        t = torch.randint(1000, (BATCH,), generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        predicted = network(scheduler.add_noise(clean, noise, t), t).sample
        loss = torch.nn.functional.mse_loss(predicted, noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.step(network.parameters())
        recent = recent + loss.detach()
        if step % 100 == 0 or step == steps:
            losses.append(round(float(recent) / (step % 100 or 100), 6))
            recent = torch.zeros(())
            progress.set_postfix(loss=losses[-1])
        progress.update()
    average.copy_to(network.parameters())
    return network.eval(), losses


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


def main(argv: list[str] | None = None) -> None:
    """Train K members one after the other and write their folders and ``training.json``."""
    parser = argparse.ArgumentParser(prog="python -m fastens.demo.train", description=__doc__)
    parser.add_argument("--data", choices=list(LOADERS), default="digits", help="which images")
    parser.add_argument("--out", type=Path, help="where the folders go; default: beside the shipped members' code")
    parser.add_argument("--members", type=int, default=5, help="how many members")
    parser.add_argument("--steps", type=int, default=2500, help="optimiser steps of each member")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first member; the others follow")
    parser.add_argument("--resume", action="store_true", help="keep members that training.json in --out has already")
    options = parser.parse_args(argv)

    import diffusers
    from diffusers.models.unets.unet_2d import UNet2DModel
    from tqdm import tqdm

    torch.use_deterministic_algorithms(True)
    out = options.out or members_folder(options.data)
    train, test = LOADERS[options.data]()
    started = time.perf_counter()
    earlier = _earlier(out, options) if options.resume else {"members": [], "seconds": 0}
    members, predictions, noise = [], [], torch.empty(0)
    with tqdm(total=options.members * options.steps, unit="step") as progress:
        for k in range(options.members):
            progress.set_description(f"member {k}")
            if k < len(earlier["members"]):
                model = UNet2DModel.from_pretrained(out / f"member_{k}", low_cpu_mem_usage=False)
                losses = earlier["members"][k]["training_loss"]
                progress.update(options.steps)
            else:
                model, losses = train_member(train, options.steps, options.seed + k, progress, MODELS[options.data])
                model.save_pretrained(out / f"member_{k}")
            noise, predicted = noise_predictions(model, test)
            predictions.append(predicted)
            loss = float((predicted - noise).square().mean())
            members.append({"seed": options.seed + k, "test_loss": round(loss, 6), "training_loss": losses})
    ensemble = float((torch.stack(predictions).mean(0) - noise).square().mean())
    arguments = argv if argv is not None else sys.argv[1:]
    log = {
        "command": shlex.join(["python", "-m", "fastens.demo.train", *arguments]),
        "data": f"scikit-learn {options.data}, {len(train)} training and {len(test)} test images, scaled to [-1, 1]",
        "steps": options.steps,
        "loss": "noise prediction, mean squared error; test: 10 fixed noise levels per image",
        "member_mean_test_loss": round(sum(m["test_loss"] for m in members) / len(members), 6),
        "mean_ensemble_test_loss": round(ensemble, 6),
        "seconds": round(time.perf_counter() - started + earlier["seconds"]),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "members": members,
    }
    (out / "training.json").write_text(json.dumps(log, indent=1) + "\n")
    print(
        f"wrote {options.members} members and training.json to {out}; test loss of the members "
        f"{log['member_mean_test_loss']:.5f} on average, of their mean {ensemble:.5f}"
    )


if __name__ == "__main__":
    main()
