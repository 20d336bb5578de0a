"""The command ``fastens evaluate``."""

from __future__ import annotations

import argparse
from pathlib import Path

EXTRA = "metrics"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's arguments."""
    what = "digits, photographs, or folders that a diffusers model saved; tabular [iris wine diabetes 'breast cancer']"
    parser.add_argument("what", nargs="+", help=what)
    parser.add_argument("--data", type=Path, help="images for folders: .npy [N, C, H, W], uint8 or in [-1, 1]")
    parser.add_argument(
        "--scheduler", type=Path, help="folder of a diffusers scheduler; default: linear beta, 1000 steps"
    )
    parser.add_argument("--prediction", help="what the members predict; default: as the scheduler says, else epsilon")
    parser.add_argument("--levels", type=int, default=256, help="how many values a pixel takes")
    parser.add_argument("--inception", type=Path, help="file of Inception weights, to judge samples with")
    parser.add_argument("--out", type=Path, default=Path("fastens-evaluation"), help="folder of the report")
    parser.add_argument("--rows", type=int, help="test rows of the loss")
    parser.add_argument("--noise-levels", type=int, default=20, help="noise levels of the loss")
    parser.add_argument("--likelihood-rows", type=int, help="test rows of the likelihood")
    parser.add_argument("--ode-steps", type=int, default=24, help="Runge-Kutta steps of the likelihood")
    parser.add_argument("--samples", type=int, help="samples per rule and member")
    parser.add_argument("--sampler-steps", type=int, default=50, help="DDIM steps of a sample")
    parser.add_argument("--batch", type=int, default=64, help="rows at a time")
    parser.add_argument("--seeds", type=int, default=3, help="tabular: splits, trainings and noises of each data set")
    parser.add_argument("--jobs", type=int, default=-1, help="tabular: processes of the training, as in joblib")
    parser.add_argument("--seed", type=int, default=0, help="seed of all noise")


def run(options: argparse.Namespace) -> None:
    """Evaluate and say where the report is.

    Raises:
        ValueError: arguments that do not fit together, or data that cannot be evaluated.
        OSError: files that cannot be read or written.
    """
    from fastens.demo.run import check_writable
    from fastens.evaluation.report import Plan, evaluate
    from fastens.evaluation.subjects import BUNDLED, bundled, from_files

    if options.what[0] == "tabular":
        _run_tabular(options)
        return
    names = [what for what in options.what if what in BUNDLED]
    if names and (len(options.what) > 1 or options.data is not None):
        raise ValueError(f"{names[0]} is evaluated alone, with its own data; got {' '.join(options.what)}")
    if not names and options.data is None:
        raise ValueError(
            f"--data is missing: the images to judge {' '.join(options.what)} on (or say one of digits, photographs)"
        )
    out = options.out / names[0] if names else options.out
    check_writable(out)
    light = names == ["photographs"]  # 12 times the dimensions of a digit
    plan = Plan(
        rows=options.rows or (160 if light else 400),
        noise_levels=options.noise_levels,
        likelihood_rows=options.likelihood_rows or (32 if light else 400),
        ode_steps=options.ode_steps,
        samples=options.samples or (200 if light else 1000),
        sampler_steps=options.sampler_steps,
        batch=options.batch,
        seed=options.seed,
    )
    counts = {"rows": plan.rows, "likelihood-rows": plan.likelihood_rows, "samples": plan.samples, "batch": plan.batch}
    counts |= {"noise-levels": plan.noise_levels, "ode-steps": plan.ode_steps, "sampler-steps": plan.sampler_steps}
    for name, number in counts.items():
        if number < (2 if name in ("rows", "likelihood-rows") else 1):
            raise ValueError(f"--{name} is {number}, which is too few")
    if names:
        subject = bundled(names[0])
    else:
        checkpoints = [Path(what) for what in options.what]
        arguments = (options.scheduler, options.prediction, options.levels, options.inception)
        subject = from_files(checkpoints, options.data, *arguments)
    report = evaluate(subject, out, plan)
    print("\n".join(report["verdict"]))
    print(f"\nreport: {out / 'report.md'} (also .json, .csv, .png)")


def _run_tabular(options: argparse.Namespace) -> None:
    from fastens.demo.run import check_writable
    from fastens.tabular import finding, finding_report

    if options.seeds < 1:
        raise ValueError(f"--seeds is {options.seeds}, which is too few")
    data = tuple(options.what[1:]) or tuple(finding.DATA)
    settings = finding.Settings(data, options.seeds, jobs=options.jobs, seed=options.seed)
    out = options.out / "tabular"
    check_writable(out)
    records = finding.run(settings, out)
    print("\n".join(finding_report.write(records, settings, out)))
    print(f"\nreport: {out / 'report.md'} (also .csv, .png)")
