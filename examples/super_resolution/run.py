"""Where do members disagree about what a small photograph was? K x N enlargements in one run, and how far they are off.

``python examples/super_resolution/run.py [FOLDER]`` writes ``maps.png`` (small patch, one enlargement, their mean, the
truth, what the members disagree about, what each alone leaves open, and the true error) and ``sparsification.png``.
"""

import sys
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from torch import Tensor
from train import FOLDER, enlarged, patches, smaller

import fastens
from fastens import uncertainty
from fastens.demo.train import make_scheduler

PATCHES, SAMPLES, STEPS, SHOWN = 24, 4, 15, 3


def enlarge(ensemble: fastens.Ensemble, small: Tensor) -> Tensor:
    """Enlarge B patches SAMPLES times by every member, [K, N, B, 1, 16, 16]."""
    scheduler = DDIMScheduler.from_config(make_scheduler().config, clip_sample=True)
    scheduler.set_timesteps(STEPS)
    given = enlarged(small)

    def sampler(num: int) -> Tensor:
        x = torch.randn(num, *given.shape)
        beside = given.expand(num, *given.shape).flatten(0, 1)
        for t in scheduler.timesteps:
            noise = ensemble(torch.cat([x.flatten(0, 1), beside], 1), t).sample
            x = scheduler.step(noise, t, x.flatten(0, 1), eta=0.0).prev_sample.view(x.shape)
        return x

    return fastens.sample_members(sampler, None, SAMPLES, ensemble=ensemble, generator=0)


def main(folder: Path) -> None:
    """Enlarge test patches, print the figures and write the pictures."""
    ensemble = fastens.Ensemble.from_pretrained(FOLDER).float()
    truth = patches()[1][:PATCHES]
    samples = enlarge(ensemble, smaller(truth))
    pooled, parts = samples.flatten(0, 1), uncertainty.decompose(samples)
    error = (pooled.mean(0) - truth).square()
    curves = uncertainty.sparsification(error, parts.epistemic)
    by_total = uncertainty.sparsification(error, parts.total)
    order = torch.randperm(error.numel(), generator=torch.Generator().manual_seed(0)).view(error.shape)
    by_chance = uncertainty.sparsification(error, order)
    print(f"AUSE by epistemic variance {curves.ause:.3f}, by total {by_total.ause:.3f}, by chance {by_chance.ause:.3f}")
    spread, skill = uncertainty.spread_skill(pooled, truth)
    print(f"spread {spread:.4f}, skill {skill:.4f}; CRPS {uncertainty.crps(pooled, truth).mean():.4f}")
    print(f"error of intervals {uncertainty.calibration(pooled, truth).error:.3f}")
    folder.mkdir(parents=True, exist_ok=True)
    shown = truth.flatten(1).std(1).topk(SHOWN).indices  # most patches are flat
    uncertainty.plot_maps(samples[:, :, shown], folder / "maps.png", truth[shown], smaller(truth)[shown])
    uncertainty.plot_sparsification(curves, folder / "sparsification.png")
    uncertainty.plot_rank_histogram(uncertainty.rank_histogram(pooled, truth), folder / "ranks.png")
    print(f"pictures: {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "super-resolution"))
