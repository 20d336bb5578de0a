"""``fastens bench``: run the benchmarks of a checkout; print the ratios and draw them."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from fastens.cli.parsing import command
from fastens.files import check_writable, write_json, write_whole


def add(commands: Any) -> None:
    """Describe the command."""
    examples = """
    fastens bench
    fastens bench --only bench_networks
    """
    parser = command(
        commands, "bench", run, "run the benchmarks of a checkout; print the ratios and draw them", examples
    )
    parser.set_defaults(needs=lambda _: ("plot",))
    parser.add_argument("--json", type=Path, help="show this pytest-benchmark result instead of running")
    parser.add_argument("--bench", type=Path, default=Path("bench"), help="folder of the benchmarks")
    parser.add_argument("--out", type=Path, default=Path("fastens-bench"), help="folder of table, plot and result")
    parser.add_argument("--only", default="", help="run the benchmarks whose names match, as pytest -k")


def run(options: argparse.Namespace) -> None:
    """Run, tabulate, draw."""
    from fastens import ratios
    from fastens.provenance import provenance

    check_writable(options.out)
    result = options.json
    if result is None:
        if not options.bench.is_dir():
            raise ValueError(f"{options.bench} is no folder; run this in a checkout, or pass --json RESULT")
        result = options.out / "bench.json"
        arguments = [sys.executable, "-m", "pytest", "-q", str(options.bench), f"--benchmark-json={result}"]
        arguments += ["-k", options.only] if options.only else []
        if subprocess.run(arguments, check=False).returncode:
            raise ValueError("a benchmark failed; its output is above")
        write_json(options.out / "provenance.json", provenance())
    rows = ratios.read(result)
    text = ratios.table(rows)
    write_whole(options.out / "ratios.md", text + "\n")
    ratios.plot(rows, options.out / "ratios.png")
    print(f"{text}\n\ntable: {options.out / 'ratios.md'}\nplot: {options.out / 'ratios.png'}")
    if ratios.plot_scaling(rows, options.out / "scaling.png"):
        print(f"time against K and B: {options.out / 'scaling.png'}")
    if memory := ratios.memory_table(rows):
        write_whole(options.out / "memory.md", memory + "\n")
        print(f"\n{memory}\n\npeak memory: {options.out / 'memory.md'}")
