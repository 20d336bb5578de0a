"""The pictures of the gallery, each by one function, from the demo's weights on the CPU.

Run: ``python examples/gallery.py [FOLDER] [NAME ...]``; without names all are drawn.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from torch import Tensor

import fastens
from fastens.demo import dropout_path, member_paths
from fastens.demo.data import load_digits
from fastens.evaluation import Denoiser, denoising_loss
from fastens.interop.diffusers import VarianceMaps

STEPS = 20
SHOWN = 8
RULES = ("mean", "median", "geometric", "dominant", "mixture", "max_abs")


def pipeline(ensemble: Any) -> Any:
    """DDIM, as diffusers has it."""
    pipe = DDIMPipeline(ensemble, DDIMScheduler(num_train_timesteps=1000))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images_of(ensemble: Any, seed: int = 0, num: int = SHOWN) -> np.ndarray:
    """Samples [num, H, W, C] in [0, 1]."""
    with ensemble.trajectory(num, torch.Generator().manual_seed(seed)):
        generator = torch.Generator().manual_seed(seed)
        return pipeline(ensemble)(num, generator, num_inference_steps=STEPS, output_type="np").images


def rows(pictures: dict[str, np.ndarray], title: str, cmap: str = "gray", top: float = 1.0, bar: str = "") -> Any:
    """A row of images for each name, all on one scale from 0 to ``top``."""
    count = len(next(iter(pictures.values())))
    figure, axes = plt.subplots(
        len(pictures),
        count,
        figsize=(1.1 * count + 1.5, 1.1 * len(pictures) + 0.5),
        squeeze=False,
        layout="constrained",
    )
    for line, (name, images) in zip(axes, pictures.items(), strict=True):
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for axis, image in zip(line, images, strict=True):
            shown = axis.imshow(image.squeeze(), cmap=cmap, vmin=0, vmax=top)
            axis.set_xticks([])
            axis.set_yticks([])
    if bar:
        figure.colorbar(shown, ax=axes, label=bar, shrink=0.8)
    figure.suptitle(title, fontsize=10)
    return figure


def rules() -> Any:
    """The same noise under six rules."""
    ensemble = fastens.Ensemble(member_paths())
    return rows({rule: images_of(ensemble.with_rule(rule)) for rule in RULES}, "digits: one noise, six rules")


def photographs() -> Any:
    """Patches of photographs under three rules, and by one member."""
    ensemble = fastens.Ensemble(member_paths("photographs"))
    found = {rule: images_of(ensemble.with_rule(rule)) for rule in ("mean", "median", "mixture")}
    found["member 0"] = images_of(fastens.Ensemble(member_paths("photographs")[:1]))
    return rows(found, "patches of photographs: one noise, three rules and one member")


def broken_member() -> Any:
    """A member whose weights were damaged: the median does not notice, the mean does."""
    members = list(fastens.load_members(member_paths()))
    with torch.no_grad():
        members[2].conv_out.weight.mul_(-4)
    ensemble = fastens.Ensemble(members)
    found = {rule: images_of(ensemble.with_rule(rule)) for rule in ("mean", "median")}
    return rows(found, "one of five members is broken")


def each_member() -> Any:
    """One run of the sampler is a run of every member, from the same noise."""
    ensemble = fastens.Ensemble(member_paths())
    runs = fastens.sample_members(pipeline(ensemble), None, SHOWN, generator=0, num_inference_steps=STEPS)
    return rows({f"member {k}": images for k, images in enumerate(runs)}, "every member from the same noise")


def branches() -> Any:
    """The later members part, the less they differ."""
    ensemble = fastens.Ensemble(member_paths())
    found = {}
    for branch in (0, STEPS // 2, 3 * STEPS // 4):
        settings = {"generator": 0, "num_inference_steps": STEPS, "branch_at": branch}
        runs = fastens.sample_members(pipeline(ensemble), None, SHOWN, **settings)
        found[f"part at {branch}"] = runs.std(0)
    return rows(found, f"deviation over members that part after so many of {STEPS} steps", "magma", 0.5, "deviation")


def variance_of_steps() -> Any:
    """The variance over members at every second step, on one scale."""
    ensemble = fastens.Ensemble(member_paths())
    with VarianceMaps(ensemble) as maps:
        images_of(ensemble, num=4)
    steps = list(range(0, STEPS, 2))
    found = {f"sample {i}": np.stack([maps.steps[step][i].sqrt().numpy() for step in steps]) for i in range(4)}
    top = max(float(images.max()) for images in found.values())
    title = f"deviation of the predicted noise over members, steps {', '.join(map(str, steps))}"
    return rows(found, title, "magma", top, "deviation")


def dropout() -> Any:
    """Where the masks of one network disagree, fixed over the run or fresh at every evaluation."""
    network = fastens.load_members([dropout_path()])[0]
    found = {}
    for masks in ("fixed", "fresh"):
        ensemble = fastens.MCDropout(network, 5, masks=masks)
        runs = fastens.sample_members(pipeline(ensemble), None, SHOWN, generator=0, num_inference_steps=STEPS)
        found[masks] = runs.std(0)
    return rows(found, "MC Dropout: deviation of the samples over five sets of masks", "magma", 0.5, "deviation")


def noisy(level: int, num: int) -> tuple[Tensor, Tensor]:
    """Test digits and their noisy version."""
    clean = load_digits()[1][:num]
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    return clean, DDIMScheduler(num_train_timesteps=1000).add_noise(clean, noise, torch.full((num,), level))


def denoised(level: int, num: int) -> tuple[Tensor, Tensor]:
    """Test digits, and what each member makes of their noisy version: [N, ...], [K, N, ...]."""
    clean, x = noisy(level, num)
    scheduler = DDIMScheduler(num_train_timesteps=1000)
    alpha = scheduler.alphas_cumprod[level]
    with torch.no_grad():
        predicted = fastens.Ensemble(member_paths()).member_outputs(x, level)
    return clean, (x - (1 - alpha).sqrt() * predicted) / alpha.sqrt()


def loss_by_level() -> Any:
    """What each rule gains or loses at every noise level."""
    ensemble = fastens.Ensemble(member_paths())
    denoiser = Denoiser(ensemble, fastens.schedules.Discrete.linear())
    loss = denoising_loss(
        denoiser, load_digits()[1][:48], rule_names=("mean", "median", "geometric", "dominant"), times=10
    )
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    loss.plot(axis)
    return figure


def rank_histogram() -> Any:
    """Five members are too sure: the truth is often outside all of them."""
    clean, found = denoised(400, 64)
    counts = fastens.uncertainty.rank_histogram(found, clean).numpy()
    figure, axis = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axis.bar(range(len(counts)), counts / counts.sum())
    axis.axhline(1 / len(counts), color="black", linestyle="--", linewidth=1)
    axis.set(xlabel="rank of the true pixel among five members", ylabel="share")
    return figure


def sparsification() -> Any:
    """Does removing the pixels that members disagree about remove the error?"""
    clean, found = denoised(400, 64)
    curves = fastens.uncertainty.sparsification((found.mean(0) - clean).abs(), found.std(0))
    figure, axis = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axis.plot(curves.fractions, curves.by_uncertainty, label=f"by disagreement, AUSE {curves.ause:.3f}")
    axis.plot(curves.fractions, curves.by_error, "--", label="by the error itself")
    axis.set(xlabel="pixels removed", ylabel="error of the rest, over that of all")
    axis.legend()
    return figure


PICTURES: dict[str, Callable[[], Any]] = {
    made.__name__: made
    for made in (
        *(rules, photographs, broken_member, each_member, branches, variance_of_steps),
        *(dropout, loss_by_level, rank_histogram, sparsification),
    )
}


def main(folder: Path, names: list[str]) -> None:
    """Draw pictures into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or list(PICTURES):
        figure = PICTURES[name]()
        figure.savefig(folder / f"{name}.png", dpi=90)
        plt.close(figure)
        print(folder / f"{name}.png", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "gallery"), sys.argv[2:])
