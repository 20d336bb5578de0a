"""The command line: one module for each command, and :func:`main`.

Exit status: 0 where the command did what was asked, 1 where its output was not read to the end, 2 for input that it
cannot take (one line on standard error says why), 130 where it was interrupted.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence

from fastens._version import __version__
from fastens.cli import bench, completion, demo, evaluate, info, inspecting, sample, tune
from fastens.cli.info import missing
from fastens.cli.parsing import Parser

COMMANDS = (demo, info, inspecting, sample, evaluate, tune, bench, completion)
# Messages of the library name its arguments: here they are options.
_OPTIONS = {
    r"pass factory=[^;]*": "say what its network is, by --like FOLDER or --factory MODULE:FUNCTION",
    r"\ballow_pickle=True": "--allow-pickle",
    r"\bema=False": "--raw",
    r"\b(key|prefix|variant|prediction|scheduler)=(?=\S?[,;.]|$)": r"--\1",
    r"\b(key|prefix|variant|prediction|scheduler)=": r"--\1 ",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; bad input is one line on standard error and exit status 2."""
    options = _parser().parse_args(argv)
    try:
        _check_installed(getattr(options, "needs", lambda _: ())(options))
        options.run(options)
    except BrokenPipeError:  # who read the output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(_failed(str(error)))
    except KeyboardInterrupt:
        print("fastens: interrupted", file=sys.stderr)
        sys.exit(130)


def _parser() -> Parser:
    parser = Parser(prog="fastens", description="Ensembles of diffusion models in one forward pass.")
    parser.add_argument("--version", action="version", version=f"fastens {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in COMMANDS:
        module.add(commands)
    parser.set_defaults(whole=parser)  # of all commands, which one of them describes
    return parser


def _check_installed(extras: Sequence[str]) -> None:
    """Raise ModuleNotFoundError, before any work, unless the packages of these extras are there."""
    lacking = list(dict.fromkeys(package for extra in extras for package in missing(extra)))
    if lacking:
        raise ModuleNotFoundError(
            f"{', '.join(lacking)} not installed: pip install 'fastens[{','.join(dict.fromkeys(extras))}]'"
        )


def _failed(message: str) -> int:
    for pattern, option in _OPTIONS.items():
        message = re.sub(pattern, option, message)
    print(f"fastens: {' '.join(message.split())}", file=sys.stderr)
    return 2
