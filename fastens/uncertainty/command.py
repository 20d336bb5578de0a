"""``fastens sample --per-member N``: K x N samples, a sheet with a row for each member, maps, and what was run."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastens._version import __version__
from fastens.files import whole, write_json
from fastens.uncertainty.measures import decompose
from fastens.uncertainty.plots import plot_maps


def run(ensemble: Any, scheduler: Any, checkpoints: Sequence[Path], options: Any) -> None:
    """Sample and write ``samples.npy`` [K, N, H, W, C] in [0, 1], ``members.png``, ``maps.png`` and ``samples.json``.

    Args:
        ensemble: of diffusers models.
        scheduler: of diffusers.
        checkpoints: the members' files, to say which they were.
        options: of the command line: ``per_member``, ``shared_noise``, ``steps``, ``seed``, ``out``.
    """
    import diffusers
    from diffusers.pipelines.ddim.pipeline_ddim import DDIMPipeline
    from PIL import Image

    from fastens.runs import sample_members

    pipeline = DDIMPipeline(ensemble, scheduler)
    samples = sample_members(
        pipeline,
        None,
        options.per_member,
        shared_noise=options.shared_noise,
        generator=options.seed,
        num_inference_steps=options.steps,
    )
    with whole(options.out / "samples.npy") as (partial,):
        np.save(partial, samples)
    rows = [np.concatenate(list(member), 1) for member in samples]  # [H, N W, C] of each member
    sheet = (np.concatenate(rows) * 255).round().astype(np.uint8)
    with whole(options.out / "members.png") as (partial,):
        Image.fromarray(sheet.squeeze(-1) if sheet.shape[-1] == 1 else sheet).save(partial)
    images = samples.transpose(0, 1, 4, 2, 3) * 2 - 1  # [K, N, C, H, W]
    with whole(options.out / "maps.png") as (partial,):
        # From shared noise sample n of each member is of the same start: as one problem each.
        plot_maps(images[:, None] if options.shared_noise else images[:, :, None], partial)
    parts = decompose(samples)
    write_json(
        options.out / "samples.json",
        {
            "command": "sample",
            "per_member": options.per_member,
            "shared_noise": options.shared_noise,
            "steps": options.steps,
            "seed": options.seed,
            "scheduler": {"class": type(scheduler).__name__, **_plain(scheduler.config)},
            "checkpoints": [{"path": str(path), "sha256": _digests(path)} for path in checkpoints],
            "versions": {
                "fastens": __version__,
                "torch": torch.__version__,
                "diffusers": diffusers.__version__,
                "python": platform.python_version(),
            },
            "device": str(ensemble.device),
            "epistemic_variance": float(parts.epistemic.mean()),
            "aleatoric_variance": float(parts.aleatoric.mean()),
        },
    )
    names = ", ".join(str(options.out / name) for name in ("samples.npy", "members.png", "maps.png"))
    print(f"{len(samples)} members, {options.per_member} samples each: {names}")


def _plain(config: Any) -> dict[str, Any]:
    kept = {name: value for name, value in dict(config).items() if not name.startswith("_")}
    return {name: value for name, value in kept.items() if isinstance(value, str | int | float | bool | None)}


def _digests(path: Path) -> dict[str, str]:
    """SHA-256 of a file, or of the files in a folder, by name."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return {
        str(p.relative_to(path)) if p != path else p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files
    }
