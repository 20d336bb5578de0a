"""``fastens sample``: images by an ensemble of checkpoints, or by each of its members, with what they were made by."""

from __future__ import annotations

import argparse
import inspect
import json
import math
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastens.cli.parsing import add_device, add_members, add_output, command, ensemble_of, positive
from fastens.files import check_writable, remove_partials, whole, write_json

if TYPE_CHECKING:
    from fastens.distributed.jobs import Job, Pieces

_RULES = "mean, sum, median, geometric, dominant, max_abs, alternating, mixture, or a rule that a package offers"


def add(commands: Any) -> None:
    """Describe the command."""
    examples = """
    fastens sample run1/unet run2/unet run3/unet --rule median --num 64
    fastens sample runs/*/last.ckpt --like run0/unet --scheduler run0/scheduler
    fastens sample run1/unet run2/unet --per-member 8 --shared-noise
    torchrun --nproc-per-node 8 -m fastens sample run1/unet run2/unet --num 50000
    """
    parser = command(commands, "sample", run, "sample images by DDIM with an ensemble of your checkpoints", examples)
    parser.set_defaults(needs=lambda options: ("diffusers", *(("plot",) if options.per_member else ())))
    add_members(parser)
    parser.add_argument("--rule", default="mean", help=_RULES)
    parser.add_argument("--num", type=positive, default=16, help="how many images")
    parser.add_argument("--batch", type=positive, default=16, help="images at a time")
    parser.add_argument("--steps", type=positive, default=50, help="sampler steps")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise and of drawn members")
    add_scheduler(parser)
    parser.add_argument(
        "--shape", type=positive, nargs=3, metavar=("C", "H", "W"), help="of an image, where no config says"
    )
    parser.add_argument(
        "--per-member", type=positive, metavar="N", help="sample N of each member, in place of --num of the ensemble"
    )
    parser.add_argument("--shared-noise", action="store_true", help="with --per-member: the same noise for all members")
    parser.add_argument(
        "--deterministic",
        action=argparse.BooleanOptionalAction,
        help="the same bytes however often and on however many ranks; default: on a CPU, where the members allow it",
    )
    parser.add_argument("--out", type=Path, default=Path("fastens-samples"), help="folder of the samples")
    add_ranks(parser)
    add_device(parser)
    add_output(parser)


def add_ranks(parser: argparse.ArgumentParser) -> None:
    """``--timeout``, of a job of several ranks."""
    what = "under torchrun: give up where no rank has finished anything in so many seconds"
    parser.add_argument("--timeout", type=positive, default=1800, help=what)


def add_scheduler(parser: argparse.ArgumentParser) -> None:
    """``--scheduler``."""
    parser.add_argument(
        "--scheduler",
        type=Path,
        metavar="FOLDER",
        help="of a diffusers scheduler; default: the one beside the first checkpoint, else linear beta in 1000 steps",
    )


_NO_SCHEDULER = (
    "fastens: no scheduler lies beside the first checkpoint, so the network is taken for one that predicts noise under "
    "1000 steps of linear beta; --scheduler FOLDER names another"
)


def scheduler_folder(options: argparse.Namespace) -> Path | None:
    """The folder of the scheduler that was named, or that a pipeline has beside its network; none for neither."""
    if options.scheduler is not None:
        return options.scheduler
    first = Path(options.checkpoints[0])
    beside = [first / "scheduler", first.parent / "scheduler"]
    return next((folder for folder in beside if (folder / "scheduler_config.json").is_file()), None)


def run(options: argparse.Namespace) -> None:
    """Sample and write."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    from fastens import reproducible, rules
    from fastens.distributed.jobs import Job, Pieces
    from fastens.evaluation.subjects import scheduler_in
    from fastens.provenance import provenance

    rule = rules.get(options.rule)
    if options.shared_noise and options.per_member is None:
        raise ValueError("--shared-noise is of --per-member N, samples of each member; samples of the ensemble are one")
    check_writable(options.out)
    folder = scheduler_folder(options)
    scheduler = DDIMScheduler(num_train_timesteps=1000) if folder is None else scheduler_in(folder)
    if "beta_schedule" not in scheduler.config:
        raise ValueError(
            f"--scheduler {folder}: {type(scheduler).__name__} has no betas, and DDIM needs them; put the ensemble "
            "into a pipeline of its own kind"
        )
    scheduler = DDIMScheduler.from_config(scheduler.config)
    job = Job(options.timeout)
    options.device = options.device or job.device
    ensemble = ensemble_of(options, rule)
    _check_unconditional(ensemble)
    shape = _shape(ensemble, options.shape)
    mode = _mode(ensemble, shape, options.deterministic)
    kept = {
        "command": "sample",
        "rule": rule.to_dict(),
        "members": ensemble.num_members,
        **{name: getattr(options, name) for name in ("num", "batch", "steps", "seed", "per_member", "shared_noise")},
        "deterministic": mode,
        "scheduler": {"class": "DDIMScheduler", "from": str(folder) if folder else "linear beta", **_plain(scheduler)},
        "layout": "float32 [N, C, H, W] in [-1, 1], as `fastens evaluate --data` reads it",
        "provenance": provenance(options.checkpoints, device=ensemble.device, seed=options.seed),
    }
    made_by = {name: kept["provenance"][name] for name in ("versions", "checkpoints")}
    sampled = _ensemble if options.per_member is None else _each_member
    result = options.out / "samples.json"
    pieces = Pieces(options.out / "pieces", {**kept, "provenance": made_by}, (options.out / "samples.npy", result))
    made = pieces.made()
    if folder is None and job.first and not options.quiet:
        print(_NO_SCHEDULER, file=sys.stderr)
    if made is None:
        with reproducible.deterministic(mode):
            found = sampled(ensemble, scheduler, shape, options, job, pieces)
        if found is None:
            return
        made = {**kept, **found, "job": pieces.job}
        write_json(result, made)
    if not job.first:
        return
    pieces.remove()
    remove_partials(options.out)
    if options.json:
        print(json.dumps(made, indent=1))
        return
    print(f"samples: {options.out / 'samples.npy'}")
    print(f"pictures: {', '.join(str(options.out / name) for name in made['pictures'])}")
    print(f"made by: {result}")


def _mode(ensemble: Any, shape: tuple[int, ...], wanted: bool | None) -> bool:
    """Whether samples are made in deterministic mode: as it is wanted, else on a CPU by members that have it."""
    import torch

    from fastens.reproducible import NotReproducible, deterministic

    if wanted is not None or ensemble.device.type != "cpu":
        return bool(wanted)
    try:
        with torch.no_grad(), deterministic(), ensemble.trajectory(2, 0):
            ensemble(torch.randn((2, *shape), generator=torch.Generator().manual_seed(0)).to(ensemble.dtype), 1)
    except NotReproducible as error:
        warnings.warn(f"a run that is started again may end with other last bits: {error}", stacklevel=2)
        return False
    return True


def ddim(
    ensemble: Any,
    scheduler: Any,
    shape: tuple[int, ...],
    steps: int,
    num: int,
    generator: Any,
    rows: slice = slice(None),
) -> Any:
    """DDIM of an unconditional network, some rows of [num, C, H, W] in [-1, 1]: what diffusers' pipeline does."""
    import torch
    from diffusers.utils.torch_utils import randn_tensor

    x = randn_tensor((num, *shape), generator=generator, device=ensemble.device, dtype=torch.float32)[rows]
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        output = ensemble(x.to(ensemble.dtype), t)
        predicted = output[0] if not isinstance(output, torch.Tensor) else output
        x = scheduler.step(predicted.to(x.dtype), t, x, generator=generator).prev_sample
    return x.clamp(-1, 1)


def _ensemble(
    ensemble: Any,
    scheduler: Any,
    shape: tuple[int, ...],
    options: argparse.Namespace,
    job: Job,
    pieces: Pieces,
) -> dict[str, Any] | None:
    """Sample in batches, which the ranks of a job share; none on those that do not write the whole."""
    import torch

    sizes = [min(options.batch, options.num - start) for start in range(0, options.num, options.batch)]
    generator, drawn = torch.Generator().manual_seed(options.seed), 0  # of batches so far

    def run(piece: int) -> np.ndarray:
        nonlocal drawn
        for size in sizes[drawn:piece]:  # the noise of batches that other ranks make, or that are there
            torch.randn((size, *shape), generator=generator)
        drawn = piece + 1
        seed = options.seed + piece * options.batch
        with torch.no_grad(), ensemble.trajectory(sizes[piece], torch.Generator().manual_seed(seed)):
            return ddim(ensemble, scheduler, shape, options.steps, sizes[piece], generator).cpu().numpy()

    images = _made(pieces, options, job, len(sizes), f"sampling by {ensemble.rule.name}", run)
    if images is None:
        return None
    samples = np.concatenate(images)  # [N, C, H, W]
    _save(options.out / "samples.npy", samples)
    columns = math.ceil(math.sqrt(len(samples)))
    _save_image(options.out / "samples.png", _sheet(samples, columns))
    for i, sample in enumerate(samples):
        _save_image(options.out / f"sample_{i:04}.png", sample)
    return {"pictures": ["samples.png"]}


def _made(pieces: Pieces, options: argparse.Namespace, job: Job, count: int, label: str, run: Any) -> Any:
    """The pieces of a job, whose progress the first rank shows; none on the others."""
    from tqdm import tqdm

    with tqdm(total=count, unit="batch", desc=label, disable=options.quiet or not job.first) as bar:
        return pieces.make(job, count, run, lambda done: bar.update(done - bar.n))


def _each_member(
    ensemble: Any,
    scheduler: Any,
    shape: tuple[int, ...],
    options: argparse.Namespace,
    job: Job,
    pieces: Pieces,
) -> dict[str, Any] | None:
    """Sample of every member, in batches of all members, which the ranks of a job share; likewise."""
    from fastens.runs import sample_members
    from fastens.uncertainty.measures import decompose
    from fastens.uncertainty.plots import plot_maps

    num, at_once = options.per_member, max(1, options.batch // ensemble.num_members)

    def run(piece: int) -> np.ndarray:
        rows = slice(piece * at_once, (piece + 1) * at_once)

        def sampler(_: int, generator: Any = None) -> Any:
            return ddim(ensemble, scheduler, shape, options.steps, num, generator, rows)

        found = sample_members(
            sampler,
            None,
            len(range(num)[rows]),
            ensemble=ensemble,
            shared_noise=options.shared_noise,
            generator=options.seed,
        )
        return found.cpu().numpy()

    parts = _made(pieces, options, job, -(-num // at_once), "sampling each member", run)
    if parts is None:
        return None
    samples = np.concatenate(parts, 1)  # [K, N, C, H, W]
    _save(options.out / "samples.npy", samples)
    _save_image(options.out / "members.png", _sheet(samples.reshape(-1, *shape), options.per_member))
    with whole(options.out / "maps.png") as (partial,):
        # From shared noise sample n of each member is of the same start: as one problem each.
        plot_maps(samples[:, None] if options.shared_noise else samples[:, :, None], partial)
    measured = decompose(samples)
    return {
        "layout": "float32 [K, N, C, H, W] in [-1, 1], N samples of each of K members",
        "pictures": ["members.png", "maps.png"],
        "epistemic_variance": float(measured.epistemic.mean()),
        "aleatoric_variance": float(measured.aleatoric.mean()),
    }


def _check_unconditional(ensemble: Any) -> None:
    """Raise ValueError for a network that takes more than a sample and a time."""
    parameters = list(inspect.signature(ensemble.forward).parameters.values())
    named = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty]
    if len(named) > 2:
        raise ValueError(
            f"the members need {', '.join(named[2:])} beside a sample and a time, which `fastens sample` has not; put "
            "the ensemble into their pipeline in Python: Pipeline.from_pretrained(..., unet=fastens.Ensemble(paths))"
        )


def _shape(ensemble: Any, given: list[int] | None) -> tuple[int, ...]:
    if given:
        return tuple(given)
    config = getattr(ensemble, "config", {})
    size, channels = (config.get(name) for name in ("sample_size", "in_channels"))
    if size is None or channels is None:
        raise ValueError("the checkpoints do not say the shape of an image; give it as --shape C H W")
    return (channels, size, size) if isinstance(size, int) else (channels, *size)


def _plain(scheduler: Any) -> dict[str, Any]:
    kept = {name: value for name, value in dict(scheduler.config).items() if not name.startswith("_")}
    return {name: value for name, value in kept.items() if isinstance(value, str | int | float | bool | None)}


def _sheet(images: np.ndarray, columns: int) -> np.ndarray:
    """Images [n, C, H, W] side by side, in rows of ``columns``: [C, rows H, columns W]. Small ones are enlarged."""
    factor = max(1, 64 // max(images.shape[2:]))
    images = images.repeat(factor, 2).repeat(factor, 3)
    n, channels, height, width = images.shape
    rows = -(-n // columns)
    sheet = np.ones((rows * columns, channels, height, width), images.dtype)
    sheet[:n] = images
    grid = sheet.reshape(rows, columns, channels, height, width).transpose(2, 0, 3, 1, 4)
    return grid.reshape(channels, rows * height, columns * width)


def _save(path: Path, array: np.ndarray) -> None:
    with whole(path) as (partial,):
        np.save(partial, array)


def _save_image(path: Path, image: np.ndarray) -> None:
    """Write [C, H, W] in [-1, 1] as PNG; of other than 1 or 3 channels the first."""
    from PIL import Image

    pixels = ((image.transpose(1, 2, 0) + 1) * 127.5).round().clip(0, 255).astype(np.uint8)
    with whole(path) as (partial,):
        Image.fromarray(pixels if pixels.shape[-1] == 3 else pixels[..., 0]).save(partial, format="PNG")
