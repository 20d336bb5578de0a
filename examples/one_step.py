"""A generator that makes digits in one step, trained by the ensemble's score: ``python examples/one_step.py``.

Score identity distillation (Zhou et al., arXiv 2404.04057, its loss with alpha = 1): a network ``fake`` follows the
score of what the generator makes, and the generator follows the mismatch of both scores at noisy samples of its own,
with gradients through the ensemble. Writes one_step.png: samples before training, and after it.
"""

import argparse
import copy
from pathlib import Path

import torch
from torch import Tensor, nn

import fastens
from fastens.demo import member_paths
from fastens.evaluation import Denoiser
from fastens.schedules import Discrete
from fastens.training import score_matching

START = 700.0  # the time from which the generator denoises in one step
SHAPE = (1, 8, 8)


def generate(generator: Denoiser, noise: Tensor) -> Tensor:
    """Samples of noise, in one evaluation."""
    t = torch.tensor(START, dtype=torch.float64)
    return generator.to("x0", generator.at(noise, t), noise, t)


def train(steps: int, batch: int = 32, learning_rate: float = 1e-4) -> tuple[Denoiser, Denoiser]:
    """The generator before training and after it."""
    schedule = Discrete.linear()
    ensemble = fastens.Ensemble(member_paths("digits"))
    teacher, member = Denoiser(ensemble, schedule), ensemble.members[0]
    before, generator, fake = (Denoiser(copy.deepcopy(member), schedule) for _ in range(3))
    optimizers = [torch.optim.Adam(d.model.parameters(), learning_rate) for d in (generator, fake)]
    draws = torch.Generator().manual_seed(0)

    def noisy(clean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t = torch.randint(20, 980, (len(clean),), generator=draws).double()
        noise = torch.randn(clean.shape, generator=draws)
        alpha, sigma = schedule.coefficients(t, clean)
        return alpha * clean + sigma * noise, t, noise

    for _ in range(steps):
        clean = generate(generator, torch.randn(batch, *SHAPE, generator=draws))
        x, t, noise = noisy(clean.detach())
        step(optimizers[1], (fake.epsilon(x, t) - noise).square().mean())  # the fake follows the generator
        x, t, noise = noisy(clean)
        theirs, ours = score_matching(teacher, fake, x, t, through=True)
        step(optimizers[0], ((theirs - ours) * (ours - noise)).sum((1, 2, 3)).mean())
    return before, generator


def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step of an optimiser."""
    optimizer.zero_grad()
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def main(out: Path, steps: int = 300) -> None:
    """Train and draw."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    before, after = train(steps)
    noise = torch.randn(12, *SHAPE, generator=torch.Generator().manual_seed(1))
    figure, axes = plt.subplots(2, 1, figsize=(9, 2.2), constrained_layout=True)
    for axis, generator, title in zip(axes, (before, after), ("one step of a member", "trained"), strict=True):
        with torch.no_grad():
            images = generate(generator, noise).clamp(-1, 1)
        axis.imshow(torch.cat([*images[:, 0]], 1), cmap="gray", vmin=-1, vmax=1)
        axis.set_title(title, fontsize=9)
        axis.axis("off")
    figure.savefig(out, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("one_step.png"))
    parser.add_argument("--steps", type=int, default=300)
    given = parser.parse_args()
    main(given.out, given.steps)
