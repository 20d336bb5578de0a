"""Train members that enlarge photographs: 8x8 to 16x16, brightness only. ``python examples/super_resolution/train.py``.

Each member is a small diffusers ``UNet2DModel`` that finds the noise (arXiv 2006.11239) in a noisy patch [B, 1, 16, 16]
beside the enlarged small one, its second channel (arXiv 2104.07636). All are trained in one folded pass, each from its
own seed and on its own batches; their moving averages are written, in half precision, to ``members`` beside this file.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import fastens
from fastens.demo.data import load_photographs
from fastens.demo.train import CLIP, MODEL, make_scheduler, new_member, optimise
from fastens.training import training_step

FOLDER = Path(__file__).resolve().parent / "members"
NETWORK = {**MODEL, "sample_size": 16, "in_channels": 2, "block_out_channels": (16, 32)}


def patches() -> tuple[Tensor, Tensor]:
    """Brightness of the photographs' patches, [1600, 1, 16, 16] to train on and [480, 1, 16, 16] to test with."""
    train, test = load_photographs()
    return train.mean(1, keepdim=True), test.mean(1, keepdim=True)


def smaller(x: Tensor) -> Tensor:
    """The mean of each 2x2 block: [B, 1, 16, 16] to [B, 1, 8, 8]."""
    return F.avg_pool2d(x, 2)


def enlarged(y: Tensor) -> Tensor:
    """The small patch as the members see it: [B, 1, 8, 8] to [B, 1, 16, 16], each pixel four times."""
    return F.interpolate(y, scale_factor=2, mode="nearest")


def main() -> None:
    """Train, and write the members and what they were trained with."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--out", type=Path, default=FOLDER)
    options = parser.parse_args()
    images, _ = patches()
    ensemble = fastens.Ensemble([new_member(k, NETWORK) for k in range(options.members)], engine="fold").train()
    generators = [torch.Generator().manual_seed(k) for k in range(options.members)]
    scheduler = make_scheduler()

    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        clean = images[torch.randint(len(images), (options.batch,), generator=generator)]
        t = torch.randint(1000, (options.batch,), generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        noisy = scheduler.add_noise(clean, noise, t)
        return torch.cat([noisy, enlarged(smaller(clean))], 1), t, noise

    def step(optimizer: torch.optim.Optimizer) -> Tensor:
        given, t, noise = (torch.stack(part) for part in zip(*map(batch, generators), strict=True))
        return training_step(ensemble, optimizer, lambda found: (found - noise).square(), given, t, max_norm=CLIP)

    started = time.process_time()
    with tqdm(total=options.members * options.steps, unit="step") as progress:
        losses = optimise(list(ensemble.parameters()), options.steps, step, progress)
    ensemble.eval().half().save_pretrained(options.out)
    log = {
        "data": "scikit-learn's two photographs, 1600 patches of 16x16, brightness in [-1, 1]",
        "members": options.members,
        "steps": options.steps,
        "batch": options.batch,
        "core_seconds": round(time.process_time() - started),
        "loss": [[round(x, 5) for x in column] for column in torch.stack(losses).T.tolist()],
    }
    (options.out / "training.json").write_text(json.dumps(log) + "\n")
    print(f"{options.members} members: {options.out}")


if __name__ == "__main__":
    main()
