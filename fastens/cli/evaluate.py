"""``fastens evaluate``: a report on the loss, likelihood, sample quality and cost of an ensemble."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from fastens.cli.parsing import (
    add_device,
    add_output,
    add_reading,
    command,
    device_of,
    ensemble_of,
    factory_of,
    members_of,
    positive,
    reading_of,
)
from fastens.cli.sample import add_scheduler, scheduler_folder
from fastens.files import check_writable, remove_partials, write_json

_INCEPTION = "file of FID's network, torch-fidelity's weights-inception-2015-12-05-6726825d.pth, to judge samples with"


def add(commands: Any) -> None:
    """Describe the command."""
    examples = """
    fastens evaluate digits --quick
    fastens evaluate run1/unet run2/unet --data held_out.npy
    fastens evaluate runs/*/last.ckpt --like run0/unet --data held_out.npy --quick
    fastens evaluate RUN_FOLDER --data held_out.npy --distill 4000
    fastens evaluate tabular iris wine
    """
    what = "report on loss, likelihood, sample quality and cost of an ensemble"
    parser = command(commands, "evaluate", run, what, examples)
    parser.set_defaults(needs=_needs)
    named = "digits, photographs, checkpoints, or a run's folder of them; tabular [iris wine diabetes 'breast cancer']"
    parser.add_argument("checkpoints", nargs="+", metavar="WHAT", help=named)
    add_reading(parser)
    parser.add_argument("--data", type=Path, help="images for checkpoints: .npy [N, C, H, W], uint8 or in [-1, 1]")
    parser.add_argument("--quick", action="store_true", help="few rows, steps and samples: an answer in a minute")
    add_scheduler(parser)
    parser.add_argument(
        "--prediction",
        choices=("epsilon", "x0", "v", "score", "flow"),
        help="what the members predict; default: as the scheduler says, else epsilon",
    )
    parser.add_argument("--levels", type=int, default=256, help="how many values a pixel takes")
    parser.add_argument("--inception", type=Path, metavar="FILE", help=_INCEPTION)
    parser.add_argument("--out", type=Path, default=Path("fastens-evaluation"), help="folder of the report")
    size = parser.add_argument_group("how much is computed", "defaults depend on the data and on --quick")
    size.add_argument("--rows", type=int, help="test rows of the loss")
    size.add_argument("--noise-levels", type=int, help="noise levels of the loss")
    size.add_argument("--likelihood-rows", type=int, help="test rows of the likelihood")
    size.add_argument("--ode-steps", type=int, help="Runge-Kutta steps of the likelihood")
    size.add_argument("--samples", type=int, help="samples per rule and member")
    size.add_argument("--sampler-steps", type=int, help="DDIM steps of a sample")
    size.add_argument("--batch", type=int, help="rows at a time")
    run_folder = parser.add_argument_group("a run's folder", "snapshots, merged, as an ensemble, and as a student")
    run_folder.add_argument("--pool", type=positive, default=8, help="the most snapshots of a merge or the ensemble")
    run_folder.add_argument("--student", metavar="CKPT", help="a checkpoint to judge beside them")
    run_folder.add_argument("--distill", type=int, default=0, metavar="STEPS", help="train a student, by so many steps")
    parser.add_argument("--seeds", type=positive, default=3, help="tabular: splits and trainings of each data set")
    parser.add_argument("--jobs", type=int, default=-1, help="tabular: processes of the training, as in joblib")
    parser.add_argument("--seed", type=int, default=0, help="seed of all noise")
    add_device(parser)
    add_output(parser)


def _needs(options: argparse.Namespace) -> tuple[str, ...]:
    if options.checkpoints[0] == "tabular":
        return ("tabular", "metrics", "plot")
    bundled = options.checkpoints[0] in ("digits", "photographs")
    return ("metrics", "demo") if bundled else ("metrics", "diffusers", "plot")


def run(options: argparse.Namespace) -> None:
    """Evaluate and say where the report is.

    Raises:
        ValueError: arguments that do not fit together, or data that cannot be evaluated.
        OSError: files that cannot be read or written.
    """
    from fastens.distributed.jobs import Job
    from fastens.evaluation.report import evaluate
    from fastens.evaluation.subjects import BUNDLED, bundled, from_files

    if options.checkpoints[0] == "tabular":
        _run_tabular(options)
        return
    names = [what for what in options.checkpoints if what in BUNDLED]
    if names and (len(options.checkpoints) > 1 or options.data is not None):
        raise ValueError(f"{names[0]} is evaluated alone, with its own data; got {' '.join(options.checkpoints)}")
    if not names and options.data is None:
        raise ValueError(
            f"--data is missing: the images to judge {' '.join(options.checkpoints)} on (or say one of digits, "
            "photographs)"
        )
    if len(options.checkpoints) == 1 and not names and (found := _snapshots(Path(options.checkpoints[0]))):
        _run_folder(options, found)
        return
    if options.student is not None or options.distill:
        raise ValueError("--student and --distill are of a run's folder, in which there are two snapshots or more")
    out = options.out / names[0] if names else options.out
    check_writable(out)
    job = Job()
    options.device = options.device or job.device
    options.quiet = options.quiet or not job.first
    plan = _plan(options, light=names == ["photographs"])
    if names:
        subject = bundled(names[0])
    else:
        if options.data is None or not options.data.is_file():  # before the members are read
            raise FileNotFoundError(f"data {options.data} does not exist")
        ensemble = ensemble_of(options)
        arguments = (scheduler_folder(options), options.prediction, options.levels, options.inception)
        subject = from_files(ensemble, options.checkpoints, options.data, *arguments)
    report = evaluate(subject, out, plan)
    if not job.first:
        return
    remove_partials(out)
    if options.json:
        print(json.dumps(report, indent=1))
        return
    print("\n".join(report["verdict"]))
    print(f"\nreport: {out / 'report.md'} (also .json, .csv, .tex, .png)")


def _snapshots(folder: Path) -> list[Path]:
    from fastens.evaluation.run_folder import snapshots

    return snapshots(folder) if folder.is_dir() else []


def _run_folder(options: argparse.Namespace, found: list[Path]) -> None:
    """Hold merges of a run's snapshots against the best of them, their ensemble and a student."""
    from fastens.evaluation.denoiser import Denoiser
    from fastens.evaluation.merging import merge_study
    from fastens.evaluation.merging_report import write
    from fastens.evaluation.run_folder import RunMembers
    from fastens.evaluation.subjects import check_shape, images_in, path_of
    from fastens.provenance import provenance

    check_writable(options.out)
    if options.student is not None and options.distill:
        raise ValueError("--student and --distill both say what the student is; give one of them")
    images = images_in(options.data)
    schedule, prediction = path_of(scheduler_folder(options), options.prediction)
    members = RunMembers(found, factory_of(options), options.raw, **reading_of(options))
    check_shape(Denoiser(members[0], schedule, prediction), images[:1], options.data)
    half = len(images) // 2
    rows = options.rows or (96 if options.quick else len(images))
    study = merge_study(
        members,
        images[:half],
        images[half:][:rows],
        schedule,
        prediction,
        student=None if options.student is None else members_of(options, [options.student])[0],
        student_steps=options.distill,
        pool=options.pool,
        times=options.noise_levels or (10 if options.quick else 20),
        steps=30 if options.quick else 100,
        seed=options.seed,
        progress=not options.quiet,
    )
    run = options.checkpoints[0]
    intro = (
        f"{len(found)} snapshots in {run}: {len(members)} members, weights and averages. All choices are made on the "
        f"first half of {options.data.name}, and judged on {min(rows, len(images) - half)} images of the second."
    )
    kept = [Path(path) for path in found]
    facts = {"snapshots": members.names, "provenance": provenance(kept, device=device_of(options), seed=options.seed)}
    report = write({"snapshots": study}, options.out, "Merge, ensemble or distil", intro, **facts)
    if options.json:
        print(json.dumps(report, indent=1))
        return
    print("\n".join(study.verdict()))
    print(f"\nreport: {options.out / 'report.md'} (also .json, .png)")


def _plan(options: argparse.Namespace, light: bool) -> Any:
    """How much is computed; ``light`` of images of many dimensions."""
    from fastens.evaluation.report import QUICK, Plan

    plan = Plan(seed=options.seed, progress=not options.quiet)
    if light:
        plan = dataclasses.replace(plan, rows=160, likelihood_rows=32, samples=200)
    if options.quick:
        plan = dataclasses.replace(plan, **QUICK)
    names = ("rows", "noise_levels", "likelihood_rows", "ode_steps", "samples", "sampler_steps", "batch")
    plan = dataclasses.replace(plan, **{n: getattr(options, n) for n in names if getattr(options, n) is not None})
    for name in names:
        if getattr(plan, name) < (2 if name in ("rows", "likelihood_rows") else 1):
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(plan, name)}, which is too few")
    return plan


def _run_tabular(options: argparse.Namespace) -> None:
    from fastens.provenance import provenance
    from fastens.tabular import finding, finding_report

    data = tuple(options.checkpoints[1:]) or tuple(finding.DATA)
    settings = finding.Settings(data, options.seeds, jobs=options.jobs, seed=options.seed)
    out = options.out / "tabular"
    check_writable(out)
    records = finding.run(settings, out, not options.quiet)
    said = finding_report.write(records, settings, out)
    write_json(out / "provenance.json", provenance(seed=options.seed))
    print("\n".join(said))
    print(f"\nreport: {out / 'report.md'} (also .csv, .png)")
