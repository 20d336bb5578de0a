"""A weather-like forecast: K members that were trained at once, N forecasts of each, in one run, and their scores.

The weather is Lorenz's model of 1996 with 8 variables. A member is a small diffusion model of the next state given the
present one; a forecast samples state after state. ``python examples/forecast.py [FOLDER]`` trains K members on the CPU
in about a minute, and writes ``forecast.png`` and the scores at every lead time.
"""

import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

import fastens
from fastens import uncertainty
from fastens.training import training_step

MEMBERS, SAMPLES, STARTS, LEADS = 4, 10, 64, 12
TRAINING_STEPS, BATCH, STEPS = 3000, 256, 12
VARIABLES, TIMES = 8, 200
ALPHAS = (1 - torch.linspace(5e-4, 0.1, TIMES)).cumprod(0)  # of the noise: from 0.9995 to nearly 0


def weather(runs: int, length: int, seed: int, interval: float = 0.1) -> Tensor:
    """Trajectories of Lorenz's model [runs, length, VARIABLES], scaled, by Runge-Kutta steps of a 20th."""

    def slope(x: Tensor) -> Tensor:
        return (x.roll(-1, -1) - x.roll(2, -1)) * x.roll(1, -1) - x + 8

    def step(x: Tensor, h: float = 0.05) -> Tensor:
        a = slope(x)
        b = slope(x + h / 2 * a)
        c = slope(x + h / 2 * b)
        return x + h / 6 * (a + 2 * b + 2 * c + slope(x + h * c))

    x = 8 + torch.randn(runs, VARIABLES, generator=torch.Generator().manual_seed(seed))
    states = []
    for i in range(200 + length):  # the first ones lead to the attractor
        for _ in range(round(interval / 0.05)):
            x = step(x)
        if i >= 200:
            states.append((x - 2.3) / 3.6)
    return torch.stack(states, 1)


class Denoiser(nn.Module):
    """Predicts the noise of the change from ``state`` to the next state."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2 * VARIABLES + 2, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, VARIABLES),
        )

    def forward(self, x: Tensor, t: Tensor, state: Tensor) -> Tensor:
        """Noise [B, VARIABLES] of changes ``x`` at times ``t`` [B]."""
        angle = t.float()[:, None] / TIMES * torch.pi
        return self.net(torch.cat([x, state, angle.cos(), angle.sin()], 1))


def train() -> fastens.Ensemble:
    """Train the members at once, each on batches of its own."""
    trajectories = weather(256, 40, seed=0)
    now, change = trajectories[:, :-1].flatten(0, 1), trajectories.diff(dim=1).flatten(0, 1)
    members = []
    for k in range(MEMBERS):
        torch.manual_seed(k)
        members.append(Denoiser())
    ensemble = fastens.Ensemble(members).train()
    optimizer = torch.optim.Adam(ensemble.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, TRAINING_STEPS)
    generator = torch.Generator().manual_seed(0)
    for _ in range(TRAINING_STEPS):
        rows = torch.randint(len(now), (MEMBERS, BATCH), generator=generator)
        t = torch.randint(TIMES, (MEMBERS, BATCH), generator=generator)
        noise = torch.randn(MEMBERS, BATCH, VARIABLES, generator=generator)
        kept = ALPHAS[t][..., None]
        noisy = kept.sqrt() * change[rows] + (1 - kept).sqrt() * noise
        training_step(ensemble, optimizer, lambda y, noise=noise: (y - noise).square(), noisy, t, now[rows])
        schedule.step()
    return ensemble.eval()


def forecasts(ensemble: fastens.Ensemble, start: Tensor) -> Tensor:
    """Forecasts [K, N, B, LEADS, VARIABLES] from B states, each state sampled from the one before."""
    levels = torch.linspace(TIMES - 1, 0, STEPS).long()

    def sampler(num: int) -> Tensor:
        """Make one model's forecasts; it knows nothing of members."""
        state = start.expand(num, *start.shape).reshape(-1, VARIABLES)
        states = []
        for _ in range(LEADS):
            x = torch.randn(state.shape)
            for i, level in enumerate(levels):
                noise = ensemble(x, level.expand(len(x)), state)
                clean = (x - (1 - ALPHAS[level]).sqrt() * noise) / ALPHAS[level].sqrt()
                then = ALPHAS[levels[i + 1]] if i + 1 < STEPS else torch.tensor(1.0)
                x = then.sqrt() * clean + (1 - then).sqrt() * noise
            state = state + x
            states.append(state)
        return torch.stack(states, 1).view(num, len(start), LEADS, VARIABLES)

    return fastens.sample_members(sampler, None, SAMPLES, ensemble=ensemble, shared_noise=False, generator=0)


def main(folder: Path) -> None:
    """Train, forecast, print the scores at every lead time and draw one forecast."""
    ensemble = train()
    truth = weather(STARTS, LEADS + 1, seed=1)
    found = forecasts(ensemble, truth[:, 0])
    after, pooled = truth[:, 1:], found.flatten(0, 1)
    print("lead  CRPS of all  of one member  spread  error of the mean  disagreement of members")
    curves = []
    for lead in range(LEADS):
        crps = uncertainty.crps(pooled[:, :, lead], after[:, lead]).mean()
        one = uncertainty.crps(found[0, :, :, lead], after[:, lead]).mean()
        spread, skill = uncertainty.spread_skill(pooled[:, :, lead], after[:, lead])
        parts = uncertainty.decompose(found[:, :, :, lead])
        curves.append((float(spread), float(skill), float(parts.epistemic.mean().sqrt())))
        print(f"{lead + 1:4d}  {crps:11.3f}  {one:13.3f}  {spread:6.3f}  {skill:17.3f}  {curves[-1][2]:10.3f}")
    folder.mkdir(parents=True, exist_ok=True)
    draw(found[:, :, 0, :, 0], truth[0, :, 0], curves).savefig(folder / "forecast.png", dpi=90)
    print(f"picture: {folder / 'forecast.png'}")


def draw(found: Tensor, truth: Tensor, curves: list[tuple[float, float, float]]) -> plt.Figure:
    """Draw one variable's forecasts [K, N, LEADS] beside what came, and the scores by lead time."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    leads = range(len(truth))
    for k, runs in enumerate(found):
        for n, run in enumerate(runs):
            label = f"member {k}" if not n else None
            left.plot(leads, torch.cat([truth[:1], run]).numpy(), color=f"C{k}", alpha=0.3, linewidth=1, label=label)
    left.plot(leads, truth.numpy(), color="black", label="truth")
    left.set(xlabel="steps ahead", ylabel="first variable")
    left.legend(fontsize=8)
    for curve, label in zip(zip(*curves, strict=True), ("spread", "error of the mean", "disagreement"), strict=True):
        right.plot(range(1, len(curves) + 1), curve, label=label)
    right.set(xlabel="steps ahead", ylabel="standard deviation", ylim=(0, None))
    right.legend(fontsize=8)
    return figure


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "forecast"))
