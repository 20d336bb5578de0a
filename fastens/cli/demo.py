"""``fastens demo``: sample digits with the shipped ensemble by every rule."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastens.cli.parsing import add_output, command, positive


def add(commands: Any) -> None:
    """Describe the command."""
    parser = command(
        commands, "demo", run, "sample digits with the shipped ensemble by every rule", "fastens demo --samples 25"
    )
    parser.set_defaults(needs=lambda _: ("demo",))
    parser.add_argument("--out", type=Path, default=Path("fastens-demo"), help="folder of picture and figures")
    parser.add_argument("--samples", type=positive, default=100, help="images per rule")
    parser.add_argument("--steps", type=positive, default=50, help="sampler steps")
    parser.add_argument("--seed", type=int, default=0, help="seed of the starting noise")
    add_output(parser)


def run(options: argparse.Namespace) -> None:
    """Sample, measure, draw."""
    import json

    from fastens.demo.run import run_demo

    figures = run_demo(options.out, options.samples, options.steps, options.seed, batch=100, progress=not options.quiet)
    if options.json:
        print(json.dumps(figures, indent=1))
        return
    medians = {row["contender"]: row["quartiles"] for row in figures["evaluation_seconds"] if row["batch"] == 1}
    ours, loop = (1e3 * medians[name][1] for name in ("mean", "loop"))
    print(f"picture: {options.out / 'demo.png'}")
    print(f"figures: {options.out / 'demo.json'}")
    print(
        f"one evaluation of {figures['members']} members at batch 1: {ours:.2f} ms, the loop over them {loop:.2f} ms; "
        f"their results differ by {figures['fold_against_loop']:.0e}"
    )
