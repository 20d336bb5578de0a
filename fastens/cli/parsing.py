"""What the commands share: parsers that suggest, and the arguments that say which members, where and how loud."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import Any, NoReturn

DTYPES = ("float32", "bfloat16", "float16")


class Parser(argparse.ArgumentParser):
    """A parser whose help names every default, and which offers the nearest word for one that it does not know."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": _Help, "allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the arguments, and leave with status 2."""
        unknown = re.search(r"invalid choice: '([^']*)'|unrecognized arguments: (\S+)", message)
        if unknown:
            word, known = unknown[1] or unknown[2], []
            for action in self._actions:
                known += action.option_strings if word.startswith("-") else map(str, action.choices or ())
            near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
            message += f"; did you mean {near[0]}?" if near else ""
        print(f"fastens: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]  # argparse's overloads
        """Parse; an unknown option is reported by the command that it was given to."""
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            getattr(options, "parser", self).error(f"unrecognized arguments: {' '.join(unknown)}")
        return options


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Examples as they are written; a default wherever there is one to say."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, ()) or "default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def command(commands: Any, name: str, run: Callable[[argparse.Namespace], None], what: str, examples: str) -> Parser:
    """Add a command.

    Args:
        commands: of the program's parser.
        name: of the command.
        run: what it does.
        what: that is, in a phrase.
        examples: command lines, one a line.
    """
    lines = "\n".join(f"  {line.strip()}" for line in examples.strip().splitlines())
    parser = commands.add_parser(
        name, help=what, description=f"{what[:1].upper()}{what[1:]}.", epilog=f"examples:\n{lines}"
    )
    parser.set_defaults(run=run, parser=parser)
    return parser


def positive(text: str) -> int:
    """A number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number of at least 1")
    return int(text)


def add_output(parser: argparse.ArgumentParser) -> None:
    """``--json`` and ``--quiet``."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON on standard output")
    parser.add_argument("--quiet", action="store_true", help="print nothing but results, errors and warnings")


def add_device(parser: argparse.ArgumentParser) -> None:
    """``--device`` and ``--dtype``."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: a GPU where torch sees one, else the CPU")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; default: as the checkpoints have them")


def add_members(parser: argparse.ArgumentParser) -> None:
    """The checkpoints, and how they are read."""
    parser.add_argument(
        "checkpoints",
        nargs="+",
        metavar="CKPT",
        help="a member each: a diffusers folder or pipeline, or with --like or --factory any file of weights",
    )
    add_reading(parser)


def add_reading(parser: argparse.ArgumentParser) -> None:
    """How checkpoints are read: as :func:`fastens.load_members` takes it."""
    group = parser.add_argument_group("reading checkpoints")
    group.add_argument("--like", type=Path, metavar="FOLDER", help="diffusers folder whose config.json is the network")
    group.add_argument("--factory", metavar="MODULE:FUNCTION", help="function that makes the network without weights")
    group.add_argument("--raw", action="store_true", help="take the weights beside an average, not the average")
    group.add_argument("--key", help="full name of the dictionary, or of a folder's model, that holds the weights")
    group.add_argument("--prefix", help="what stands in front of the network's names")
    group.add_argument("--variant", help="of the files in a diffusers folder: fp16, ema, non_ema, ...")
    group.add_argument("--allow-pickle", action="store_true", help="run the code that pickles name")


def factory_of(options: argparse.Namespace) -> Callable[[], Any] | None:
    """The function that makes a member's network; none where the checkpoint describes it.

    Raises:
        ValueError: both ``--like`` and ``--factory``, a folder without a model, a function that is not there.
        FileNotFoundError: no such folder.
    """
    from fastens.io.described import factory

    if options.like is not None and options.factory is not None:
        raise ValueError("--like and --factory both say what the network is; give one of them")
    if options.like is not None:
        return factory(model_folder(options.like))
    return None if options.factory is None else _imported(options.factory)


def model_folder(folder: Path) -> Path:
    """The folder of a diffusers model: itself, or the denoiser below it.

    Raises:
        FileNotFoundError: no such folder, or no model in it.
    """
    from fastens.io.choice import Wish
    from fastens.io.folders import CONFIG
    from fastens.io.folders import model_folder as found

    if folder.name == CONFIG:
        folder = folder.parent
    if folder.is_dir():
        folder, _ = found(folder, Wish(True, None, None, None))
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"--like {folder} has no {CONFIG}, expected a folder that a diffusers model saved")
    return folder


def _imported(name: str) -> Callable[[], Any]:
    """The function of ``module:function``; modules of the current folder are found too."""
    module, _, function = name.partition(":")
    sys.path.insert(0, "")
    try:
        return attrgetter(function)(import_module(module))
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--factory {name}: {error}; expected MODULE:FUNCTION, as in models:make_unet") from error
    finally:
        sys.path.remove("")


def members_of(options: argparse.Namespace, paths: list[str] | None = None) -> Any:
    """The members that the options name, read when an ensemble takes them.

    Raises:
        ValueError, OSError: as :func:`fastens.load_members`.
    """
    import fastens

    return fastens.load_members(
        paths or options.checkpoints, factory_of(options), not options.raw, **reading_of(options)
    )


def reading_of(options: argparse.Namespace) -> dict[str, Any]:
    """How the options say that a checkpoint is read, and where its member is put."""
    import torch

    where = {"device": device_of(options), "dtype": options.dtype and getattr(torch, options.dtype)}
    return {name: getattr(options, name) for name in ("key", "prefix", "variant", "allow_pickle")} | where


def ensemble_of(options: argparse.Namespace, rule: Any = "mean") -> Any:
    """The ensemble of the members that the options name; their paths then stand in ``options.checkpoints``."""
    import fastens

    with warnings.catch_warnings():
        if len(options.checkpoints) == 1:
            warnings.filterwarnings("ignore", "fastens: all .* members hold the same weights")
        members = members_of(options)
        options.checkpoints = members.paths
        return fastens.Ensemble(members, rule)


def device_of(options: argparse.Namespace) -> str:
    """Where to compute.

    Raises:
        ValueError: a device that torch does not have here.
    """
    import torch

    from fastens.device import gpu

    found = gpu()
    name = options.device or ("cpu" if found is None else str(found.where))
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return name
