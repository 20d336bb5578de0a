"""The main job: sample digits with the shipped ensemble by every rule, and draw what came of it."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastens import rules
from fastens.demo import member_paths
from fastens.demo.picture import draw
from fastens.demo.train import make_scheduler
from fastens.ensemble import Ensemble
from fastens.files import check_writable, write_json
from fastens.provenance import provenance

RULES = ("mean", "geometric", "median", "dominant", "max_abs", "sum", "alternating", "mixture")


def sample(
    ensemble: Any, scheduler: Any, num: int, steps: int, seed: int, batch: int, progress: Any = None
) -> np.ndarray:
    """Sample images through diffusers' DDIM pipeline, unmodified.

    Args:
        ensemble: what the pipeline takes as its UNet.
        scheduler: a diffusers scheduler.
        num: how many images.
        steps: sampler steps.
        seed: of the starting noise, and of the member draws of random rules; equal for equal ``batch``.
        batch: images at a time.
        progress: told of the images that are done.

    Returns:
        float32 [num, height, width, channels] in [0, 1].
    """
    from diffusers.pipelines.ddim.pipeline_ddim import DDIMPipeline

    pipe = DDIMPipeline(unet=ensemble, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    images = []
    for start in range(0, num, batch):
        size = min(batch, num - start)
        with ensemble.trajectory(size, torch.Generator().manual_seed(seed + start)):
            output: Any = pipe(size, generator, num_inference_steps=steps, output_type="np")
            images.append(output.images)
        if progress is not None:
            progress.update(size)
    return np.concatenate(images)


def variance_maps(ensemble: Ensemble, clean: Tensor, t: int, seed: int) -> Tensor:
    """The members' variance about the noise in ``clean`` [B, C, H, W] at level ``t``, of the same shape."""
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    times = torch.full((len(clean),), t)
    with torch.no_grad():
        return ensemble.forward_with_variance(make_scheduler().add_noise(clean, noise, times), t)[1]


def time_evaluations(ensemble: Ensemble, batches: tuple[int, ...], rounds: int, progress: Any) -> list[dict[str, Any]]:
    """Seconds of one score evaluation: ours for every rule, the loop over the members, and ``torch.func.vmap``.

    Rounds are interleaved, so that a busy machine slows all contenders alike; median and quartiles are given.
    """
    members = list(ensemble.members)
    params, buffers = torch.func.stack_module_state(members)

    def one(p: Any, b: Any, x: Tensor, t: Tensor) -> Tensor:
        return torch.func.functional_call(members[0], (p, b), (x, t)).sample

    vmapped = torch.vmap(one, in_dims=(0, 0, None, None))
    results = []
    for batch in batches:
        x = torch.randn(batch, 1, 8, 8, generator=torch.Generator().manual_seed(batch))
        t = torch.full((batch,), 500)

        def ours(rule: str, x: Tensor = x, t: Tensor = t) -> Tensor:
            ensemble.rule = rule
            with ensemble.trajectory(len(x), torch.Generator().manual_seed(0)):
                return ensemble(x, t).sample

        contenders: dict[str, Any] = {rule: (lambda rule=rule: ours(rule)) for rule in RULES}
        contenders["loop"] = lambda x=x, t=t: torch.stack([member(x, t).sample for member in members]).mean(0)
        contenders["vmap"] = lambda x=x, t=t: vmapped(params, buffers, x, t).mean(0)
        failed: dict[str, str] = {}
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        with torch.no_grad():
            for turn in range(rounds + 1):  # the first round warms up
                for name, run in contenders.items():
                    if name in failed:
                        continue
                    started = time.perf_counter()
                    try:
                        run()
                    except RuntimeError as error:
                        failed[name] = str(error).splitlines()[0]
                        continue
                    if turn:
                        seconds[name].append(time.perf_counter() - started)
                progress.update()
        for name in contenders:
            quartiles = np.percentile(seconds[name], (25, 50, 75)).tolist() if seconds[name] else None
            results.append({"batch": batch, "contender": name, "quartiles": quartiles, "failed": failed.get(name)})
    return results


def run_demo(
    out: Path,
    num: int = 100,
    steps: int = 50,
    seed: int = 0,
    batch: int = 100,
    rounds: int = 15,
    progress: bool = True,
) -> dict[str, Any]:
    """Sample, measure, draw; write ``demo.png`` and ``demo.json`` into ``out``.

    Returns:
        What is in ``demo.json``.
    """
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from tqdm import tqdm

    check_writable(out)
    started = time.perf_counter()
    ensemble = Ensemble(member_paths())
    scheduler = DDIMScheduler.from_config(make_scheduler().config, clip_sample=True)
    images: dict[str, np.ndarray] = {}
    sampling: dict[str, float] = {}
    batches = (1, 16)
    evaluations = len(batches) * (rounds + 1)  # each counts as an image
    with tqdm(total=len(RULES) * num + evaluations, unit="image", disable=not progress) as bar:
        for rule in RULES:
            bar.set_description(f"sampling by {rule}")
            ensemble.rule = rule
            begun = time.perf_counter()
            images[rule] = sample(ensemble, scheduler, num, steps, seed, batch, bar)
            sampling[rule] = round(time.perf_counter() - begun, 3)
        ensemble.rule = "mean"
        clean = torch.from_numpy(images["mean"]).permute(0, 3, 1, 2) * 2 - 1
        variance = variance_maps(ensemble, clean, 300, seed)
        bar.set_description("timing evaluations")
        timing = time_evaluations(ensemble, batches, rounds, bar)
    draw(images, variance, timing, ensemble.num_members, out / "demo.png")
    figures = {
        "members": ensemble.num_members,
        "samples_per_rule": num,
        "steps": steps,
        "seed": seed,
        "engine": ensemble.engine,
        "fold_against_loop": ensemble.verify(clean[:4], 300),
        "sampling_seconds": sampling,
        "evaluation_seconds": timing,
        "mean_image_variance": float(variance.mean()),
        "rules": {rule: rules.get(rule).to_dict() for rule in RULES},
        "provenance": provenance(member_paths(), seed=seed),
        "seconds": round(time.perf_counter() - started, 1),
    }
    write_json(out / "demo.json", figures)
    return figures
