"""Which digit an image is, by log-likelihoods: ``python examples/class_likelihoods.py``.

Trains three small conditional networks on the digits that scikit-learn bundles, all at once, classifies the test images
under each and under their mean, and writes the report in docs/evaluation/classes.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import fastens
from fastens.demo.data import load_digits, load_labels
from fastens.evaluation import ClassLikelihoods, Denoiser, class_log_likelihoods
from fastens.schedules import VP
from fastens.training import training_step

MEMBERS, BATCH, CLASSES = 3, 128, range(10)
SCHEDULE = VP()


class Network(nn.Module):
    """Residual layers on 64 pixels, a sinusoidal time and a class."""

    def __init__(self, width: int = 192, depth: int = 3) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, width), nn.Linear(width, 64)
        self.condition = nn.Linear(32, width)
        self.label = nn.Embedding(10, width)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
            for _ in range(depth)
        )

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        """The noise in x [B, 1, 8, 8]."""
        level = SCHEDULE.log_snr(t).to(x.dtype)
        waves = 2.0 ** torch.arange(-3, 5, dtype=x.dtype, device=x.device) * level.unsqueeze(-1) / 4
        condition = self.condition(torch.cat([waves.sin(), waves.cos(), (waves + 1).sin(), (waves + 1).cos()], -1))
        condition = condition + self.label(class_labels)
        h = self.first(x.flatten(-3))
        for layer in self.layers:
            h = h + layer(h + condition)
        return self.last(h).view_as(x)


def trained(steps: int) -> fastens.Ensemble:
    """Members from seeds of their own, each on batches of its own; their moving averages."""
    images, labels = load_digits()[0], load_labels("digits")[0]
    networks = []
    for seed in range(MEMBERS):
        torch.manual_seed(seed)
        networks.append(Network())
    ensemble = fastens.Ensemble(networks, prediction="epsilon", schedule=SCHEDULE).train()
    averages = [p.detach().clone() for p in ensemble.parameters()]
    optimizer = torch.optim.AdamW(ensemble.parameters(), lr=2e-3, weight_decay=1e-3)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(images), (MEMBERS, BATCH), generator=generator)
        t = SCHEDULE.eps + (1 - SCHEDULE.eps) * torch.rand(MEMBERS, BATCH, generator=generator)
        noise = torch.randn(MEMBERS, BATCH, 1, 8, 8, generator=generator)
        alpha, sigma = (c.float().view(MEMBERS, BATCH, 1, 1, 1) for c in (SCHEDULE.alpha(t), SCHEDULE.sigma(t)))
        noisy = alpha * images[rows] + sigma * noise
        training_step(ensemble, optimizer, lambda y, e=noise: (y - e).square(), noisy, t, labels[rows], max_norm=1.0)
        plan.step()
        with torch.no_grad():
            for average, parameter in zip(averages, ensemble.parameters(), strict=True):
                average.lerp_(parameter, 0.005)
    with torch.no_grad():
        for parameter, average in zip(ensemble.parameters(), averages, strict=True):
            parameter.copy_(average)
    return ensemble.eval()


def page(found: ClassLikelihoods, early: ClassLikelihoods, labels: Tensor, seconds: float) -> str:
    """The report in Markdown."""
    named = {"mean of 3": found.accuracy(labels)} | {f"member {k}": found.accuracy(labels, k) for k in range(MEMBERS)}
    rows = [f"| {name} | {v.value:.3f} [{v.low:.3f}, {v.high:.3f}] |" for name, v in named.items()]
    assert found.members is not None
    right = np.asarray(labels)[:, None] == np.stack([found.predicted, *(m.argmax(1) for m in found.members)], 1)
    gained = right[:, 0].astype(float) - right[:, 1:].mean(1)
    error = gained.std(ddof=1) / len(gained) ** 0.5
    share = early.draws.sum() / found.draws.sum()
    same = (early.predicted == found.predicted).mean()
    return "\n".join(
        [
            "# Digits by likelihood",
            "",
            "`python examples/class_likelihoods.py` makes this page: three small conditional networks are trained at "
            f"once on 1400 digits, and {len(labels)} test digits are classified by denoising errors under each class, "
            f"with {int(found.draws.max())} draws of noise that all classes share. Brackets are 95 % intervals.",
            "",
            "| by | accuracy |",
            "|---|---|",
            *rows,
            "",
            f"The mean's accuracy is {100 * gained.mean():+.1f} ± {100 * error:.1f} percentage points from that of its "
            "members, on average over them and paired by image (one standard error).",
            "",
            f"Where classes are given up at three standard errors, {100 * share:.0f} % of the draws are taken, and "
            f"{100 * same:.1f} % of the answers are the same.",
            "",
            f"The page took {seconds / 60:.1f} minutes.",
            "",
        ]
    )


def main() -> None:
    """Write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/evaluation/classes"))
    parser.add_argument("--steps", type=int, default=1000, help="of training")
    parser.add_argument("--draws", type=int, default=32)
    given = parser.parse_args()
    begun = time.perf_counter()
    denoiser = Denoiser(trained(given.steps))
    print(f"trained in {time.perf_counter() - begun:.0f} s", flush=True)
    images, labels = load_digits()[1], load_labels("digits")[1]
    found = class_log_likelihoods(denoiser, images, CLASSES, draws=given.draws)
    early = class_log_likelihoods(denoiser, images, CLASSES, draws=given.draws, give_up=3.0)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "report.md").write_text(page(found, early, labels, time.perf_counter() - begun))


if __name__ == "__main__":
    main()
