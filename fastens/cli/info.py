"""``fastens info``: what is installed, and what runs the ops here."""

from __future__ import annotations

import argparse
import json
import platform
from importlib.util import find_spec
from typing import Any

from fastens.cli.parsing import command
from fastens.demo import weights_folder

EXTRAS = {
    "diffusers": ("diffusers", "safetensors", "tqdm"),
    "plot": ("matplotlib",),
    "tabular": ("scikit-learn", "xgboost", "lightgbm", "pandas", "joblib", "tqdm", "POT"),
    "demo": ("fastens-demo", "diffusers", "safetensors", "tqdm", "matplotlib", "scikit-learn"),
    "metrics": ("torchdiffeq", "torchmetrics", "scipy", "tqdm"),
}
# Imported under another name than they are installed by. Modules, not distributions: xgboost-cpu brings xgboost too.
MODULES = {"scikit-learn": "sklearn", "POT": "ot", "fastens-demo": "fastens_demo"}


def missing(extra: str) -> list[str]:
    """The packages of an extra that are not here; in a checkout the demo's weights are."""
    absent = [package for package in EXTRAS[extra] if find_spec(MODULES.get(package) or package) is None]
    return [package for package in absent if package != "fastens-demo" or weights_folder() is None]


def add(commands: Any) -> None:
    """Describe the command."""
    parser = command(commands, "info", run, "say what is installed, and what runs the ops here", "fastens info --json")
    parser.add_argument("--json", action="store_true", help="print it as JSON")


def run(options: argparse.Namespace) -> None:
    """Print what is found."""
    found = gather()
    if options.json:
        print(json.dumps(found, indent=1))
        return
    versions = found["versions"]
    print(f"fastens {versions['fastens']}, torch {versions['torch']}, Python {versions['python']}")
    print(f"CPU: {found['cpu']['capability']}, {found['cpu']['threads']} threads")
    print(f"instruction set of the compiled kernels: {found['cpu']['target']}")
    print(f"GPU: {found['gpu'] or 'none that torch can use'}")
    for name, state in found["backends"].items():
        print(f"backend {name}: {state}")
    print(f"plans: {found['plans']}")
    print(f"machine code of GPU kernels: {found['gpu_code']}")
    for device, ops in found["measured_choices"].items():
        for op, ways in ops.items():
            print(f"measured choices of {op} on {device}: {', '.join(f'{n} {way}' for way, n in ways.items())}")
    print(f"table of measured choices: {found['table']}")
    for extra, lacking in found["missing"].items():
        print(f"extra [{extra}]: {'missing ' + ', '.join(lacking) if lacking else 'installed'}")


def gather() -> dict[str, Any]:
    """Versions, processor, backends, plans, measured choices, and what each extra lacks."""
    import torch

    import fastens
    from fastens import proven
    from fastens.device import gpu
    from fastens.ops._choice import TABLE

    found = gpu()
    choices: dict[str, dict[str, Any]] = {}
    for (device, op), ways in TABLE.summary().items():
        choices.setdefault(device, {})[op] = dict(ways)
    return {
        "versions": {
            "fastens": fastens.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "cpu": {
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "target": _target(),
        },
        "gpu": None if found is None else found.name,
        "backends": dict(fastens.backends()),
        "plans": _plans(),
        "gpu_code": proven.describe(),
        "measured_choices": choices,
        "table": str(TABLE.path),
        "missing": {extra: missing(extra) for extra in EXTRAS},
    }


def _target() -> str:
    from fastens.ops.run_program import why_target

    try:
        return why_target() or "none, for want of the native library"
    except RuntimeError as error:
        return f"none; {error}"


def _plans() -> str:
    from fastens.ops.run_program import available, describe_target, target

    try:
        return f"run on {describe_target(target())}" if available() else "none, for want of the native library"
    except RuntimeError as error:
        return f"none; {error}"
