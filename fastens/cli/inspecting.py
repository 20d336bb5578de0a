"""``fastens inspect``: what is in a checkpoint, and which weights of it would be taken."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastens.cli.parsing import add_reading, command, factory_of


def add(commands: Any) -> None:
    """Describe the command."""
    examples = """
    fastens inspect last.ckpt
    fastens inspect last.ckpt --like run0/unet
    fastens inspect last.ckpt --factory models:make_unet --names
    """
    parser = command(
        commands, "inspect", run, "say what is in a checkpoint, and which weights of it would be taken", examples
    )
    parser.add_argument("checkpoints", nargs="+", type=Path, metavar="FILE", help="files or folders; none is run")
    parser.add_argument("--names", action="store_true", help="list every tensor with its shape")
    add_reading(parser)


def run(options: argparse.Namespace) -> None:
    """Print what is found."""
    from fastens.io.choice import Wish
    from fastens.io.inspection import report

    wish = Wish(not options.raw, options.key, options.prefix, options.variant)
    for path in options.checkpoints:
        for line in report(path, wish, factory_of(options), options.names):
            print(line)
