"""``fastens completion``: a script that completes commands and options in a shell."""

from __future__ import annotations

import argparse
from typing import Any

from fastens.cli.parsing import command


def add(commands: Any) -> None:
    """Describe the command."""
    examples = """
    fastens completion bash > ~/.local/share/bash-completion/completions/fastens
    fastens completion zsh > ~/.zsh/completions/_fastens
    """
    parser = command(commands, "completion", run, "print a script that completes commands in a shell", examples)
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="the shell")


def run(options: argparse.Namespace) -> None:
    """Print the script."""
    try:
        import shtab
    except ImportError as error:
        raise ModuleNotFoundError("shtab, which writes completions, is not installed: pip install shtab") from error
    print(shtab.complete(options.whole, options.shell))
