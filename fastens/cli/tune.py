"""``fastens tune``: measure on this GPU which way of each op is the fastest."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

from fastens.cli.parsing import DTYPES, add_members, command, members_of, positive
from fastens.modes import evaluating, moved


def add(commands: Any) -> None:
    """Describe the command."""
    examples = """
    fastens tune run1/unet run2/unet
    fastens tune run1/unet --members 5 --batch 1 16 64
    """
    what = "measure on this GPU which way of each op is the fastest; can be resumed"
    parser = command(commands, "tune", run, what, examples)
    add_members(parser)
    parser.add_argument("--members", type=positive, help="members, of one checkpoint's shape; default: one per CKPT")
    parser.add_argument("--batch", type=positive, nargs="+", default=[1, 16], help="images at a time")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the weights")
    parser.add_argument("--device", help="the GPU")
    parser.add_argument("--out", type=Path, help="also write all that is known of this GPU to this file")


def run(options: argparse.Namespace) -> None:
    """Measure and say how much."""
    import torch
    from tqdm import tqdm

    import fastens
    from fastens.device import gpu
    from fastens.ops._choice import TABLE
    from fastens.tune import calls_of, export, tune

    if gpu() is None:
        raise ValueError("tune measures on a GPU, and torch sees none; on the CPU there is nothing to choose")
    one = len(options.checkpoints) == 1
    paths = options.checkpoints * (options.members or 1) if one else options.checkpoints
    members = [moved(member, memory_format=torch.channels_last) for member in members_of(options, paths)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fastens: all .* members hold the same weights")  # as --members asks for
        ensemble = evaluating(fastens.Ensemble(members))
    calls = calls_of(ensemble, options.batch)
    measured = tune(calls, ensemble.device, lambda unknown: tqdm(unknown, unit="shape", desc="measuring"))
    print(f"{measured} of {len(calls)} shapes measured, the others were known: {TABLE.path}")
    if options.out is not None:
        print(f"{export(options.out, ensemble.device)} measurements: {options.out}")
