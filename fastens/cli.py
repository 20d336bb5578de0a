"""The command line: ``fastens demo``, ``info``, ``inspect``, ``sample``, ``evaluate``, ``tune`` and ``bench``."""

import argparse
import platform
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from typing import Any

from fastens.files import whole, write_json, write_whole

EXTRAS = {
    "diffusers": ("diffusers", "safetensors", "tqdm"),
    "plot": ("matplotlib",),
    "tabular": ("scikit-learn", "xgboost", "lightgbm", "pandas", "joblib", "tqdm", "POT"),
    "demo": ("diffusers", "safetensors", "tqdm", "matplotlib", "scikit-learn"),
    "metrics": ("torchdiffeq", "torchmetrics", "scipy", "tqdm"),
}
MODULES = {"scikit-learn": "sklearn", "POT": "ot"}  # imported under another name than they are installed by


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; bad input is one line on standard error and exit status 2."""
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        options.run(options)
    except ModuleNotFoundError as error:
        extra = {"demo": "demo", "evaluate": "metrics,demo,tabular"}.get(options.command, "diffusers,plot")
        sys.exit(_failed(f"{error.name} is not installed: pip install 'fastens[{extra}]'"))
    except (ValueError, OSError) as error:
        sys.exit(_failed(str(error)))


def _failed(message: str) -> int:
    print(f"fastens: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def _parser() -> argparse.ArgumentParser:
    from fastens.evaluation.command import add_arguments as add_evaluate_arguments

    parser = argparse.ArgumentParser(prog="fastens", description="Ensembles of diffusion models in one forward pass.")
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="what is installed, and what runs the ops here")
    info.set_defaults(run=_info)
    inspect = commands.add_parser("inspect", help="what is in a checkpoint, and which weights of it would be taken")
    inspect.add_argument("checkpoints", nargs="+", type=Path, metavar="FILE", help="files or folders; none is run")
    inspect.add_argument("--key", help="full name of the dictionary, or of a folder's model, with the weights")
    inspect.add_argument("--prefix", help="what stands in front of the network's names")
    inspect.add_argument("--variant", help="of the files in a diffusers folder: fp16, ema, non_ema, ...")
    inspect.add_argument("--factory", metavar="MODULE:FUNCTION", help="makes the network that the weights are for")
    inspect.add_argument("--names", action="store_true", help="list every tensor with its shape")
    inspect.set_defaults(run=_inspect)
    demo = commands.add_parser("demo", help="sample digits with the shipped ensemble by every rule")
    demo.add_argument("--out", type=Path, default=Path("fastens-demo"), help="folder of picture and figures")
    demo.add_argument("--samples", type=_positive, default=100, help="images per rule")
    demo.set_defaults(run=_demo, batch=100)
    sample = commands.add_parser("sample", help="sample images with an ensemble of your diffusers checkpoints")
    sample.add_argument("checkpoints", nargs="+", type=Path, metavar="CKPT", help="folders that UNet2DModel saved")
    sample.add_argument("--rule", default="mean", help="aggregation rule")
    sample.add_argument("--num", type=_positive, default=16, help="how many images")
    sample.add_argument("--batch", type=_positive, default=16, help="images at a time")
    sample.add_argument(
        "--scheduler", type=Path, help="folder of a diffusers scheduler; default: linear beta, 1000 steps"
    )
    sample.add_argument("--out", type=Path, default=Path("fastens-samples"), help="folder of the samples")
    sample.add_argument(
        "--per-member", type=_positive, metavar="N", help="sample N of each member, in place of --num of the ensemble"
    )
    sample.add_argument("--shared-noise", action="store_true", help="with --per-member: the same noise for all members")
    sample.set_defaults(run=_sample)
    evaluate = commands.add_parser(
        "evaluate", help="report on loss, likelihood, sample quality and cost of an ensemble"
    )
    add_evaluate_arguments(evaluate)
    evaluate.set_defaults(run=_evaluate)
    tune = commands.add_parser("tune", help="measure on this GPU which way of each op is the fastest; can be resumed")
    tune.add_argument("checkpoints", nargs="+", type=Path, metavar="CKPT", help="folders that UNet2DModel saved")
    tune.add_argument("--members", type=_positive, help="members, of one checkpoint's shape; default: one per CKPT")
    tune.add_argument("--batch", type=_positive, nargs="+", default=[1, 16], help="images at a time")
    tune.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    tune.add_argument("--out", type=Path, help="also write all that is known of this GPU to this file")
    tune.set_defaults(run=_tune)
    bench = commands.add_parser("bench", help="run the benchmarks of a checkout; print the ratios and draw them")
    bench.add_argument("--json", type=Path, help="show this pytest-benchmark result instead of running")
    bench.add_argument("--bench", type=Path, default=Path("bench"), help="folder of the benchmarks")
    bench.add_argument("--out", type=Path, default=Path("fastens-bench"), help="folder of table, plot and result")
    bench.add_argument("--only", default="", help="run the benchmarks whose names match, as pytest -k")
    bench.set_defaults(run=_bench)
    for command in (demo, sample):
        command.add_argument("--steps", type=_positive, default=50, help="sampler steps")
        command.add_argument("--seed", type=int, default=0, help="seed of the starting noise")
    return parser


def _info(_: argparse.Namespace) -> None:
    import torch

    import fastens
    from fastens.ops._choice import TABLE

    print(f"fastens {fastens.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"CPU: {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    print(f"GPU: {torch.cuda.get_device_name() if torch.cuda.is_available() else 'none that torch can use'}")
    for name, state in fastens.backends().items():
        print(f"backend {name}: {state}")
    print(f"plans: {_plans()}")
    for (device, op), ways in TABLE.summary().items():
        print(f"measured choices of {op} on {device}: {', '.join(f'{n} {way}' for way, n in ways.items())}")
    print(f"table of measured choices: {TABLE.path}")
    for extra, packages in EXTRAS.items():
        # Modules, not distributions: xgboost-cpu brings xgboost too.
        missing = [package for package in packages if find_spec(MODULES.get(package, package)) is None]
        print(f"extra [{extra}]: {'missing ' + ', '.join(missing) if missing else 'installed'}")


def _plans() -> str:
    from fastens.ops.run_program import available, describe_target, target

    try:
        return f"run on {describe_target(target())}" if available() else "none, for want of the native library"
    except RuntimeError as error:  # of C++: what it says comes behind the place in the source
        name = "FASTENS_CPU_TARGET"
        return f"none; {name}{str(error).partition(name)[2].splitlines()[0]}"


def _inspect(options: argparse.Namespace) -> None:
    from fastens.io.choice import Wish
    from fastens.io.inspection import report

    factory = None if options.factory is None else _imported(options.factory)
    for path in options.checkpoints:
        for line in report(path, Wish(True, options.key, options.prefix, options.variant), factory, options.names):
            print(line)


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


def _demo(options: argparse.Namespace) -> None:
    from fastens.demo.run import run_demo

    run_demo(options.out, options.samples, options.steps, options.seed, options.batch)


def _sample(options: argparse.Namespace) -> None:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from tqdm import tqdm

    import fastens
    from fastens.demo.run import check_writable, sample

    rule = fastens.rules.get(options.rule)
    if options.shared_noise and options.per_member is None:
        raise ValueError("--shared-noise is of --per-member N, samples of each member; samples of the ensemble are one")
    check_writable(options.out)
    ensemble = fastens.Ensemble(fastens.load_members(options.checkpoints), rule)
    if options.scheduler is None:
        scheduler = DDIMScheduler(num_train_timesteps=1000)
    else:
        scheduler = DDIMScheduler.from_pretrained(options.scheduler)
    if options.per_member is not None:
        from fastens.uncertainty.command import run

        run(ensemble, scheduler, options.checkpoints, options)
        return
    with tqdm(total=options.num, unit="image", desc=f"sampling by {rule.name}") as progress:
        images = sample(ensemble, scheduler, options.num, options.steps, options.seed, options.batch, progress)
    _write_samples(options, images)


def _tune(options: argparse.Namespace) -> None:
    import torch
    from tqdm import tqdm

    import fastens
    from fastens.ops._choice import TABLE
    from fastens.tune import calls_of, export, tune

    if not torch.cuda.is_available():
        raise ValueError("tune measures on a GPU, and torch sees none; on the CPU there is nothing to choose")
    paths = options.checkpoints * (options.members or 1) if len(options.checkpoints) == 1 else options.checkpoints
    members = [member.to(memory_format=torch.channels_last) for member in fastens.load_members(paths)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fastens: all .* members hold the same weights")  # as --members asks for
        ensemble = fastens.Ensemble(members).eval().to("cuda", getattr(torch, options.dtype))
    calls = calls_of(ensemble, options.batch)
    measured = tune(calls, ensemble.device, lambda unknown: tqdm(unknown, unit="shape", desc="measuring"))
    print(f"{measured} of {len(calls)} shapes measured, the others were known: {TABLE.path}")
    if options.out is not None:
        print(f"{export(options.out, ensemble.device)} measurements: {options.out}")


def _evaluate(options: argparse.Namespace) -> None:
    from fastens.evaluation.command import run

    run(options)


def _bench(options: argparse.Namespace) -> None:
    from fastens import ratios
    from fastens.demo.run import check_writable

    check_writable(options.out)
    result = options.json
    if result is None:
        if not options.bench.is_dir():
            raise ValueError(f"{options.bench} is no folder; run this in a checkout, or pass --json RESULT")
        result = options.out / "bench.json"
        command = [sys.executable, "-m", "pytest", "-q", str(options.bench), f"--benchmark-json={result}"]
        command += ["-k", options.only] if options.only else []
        if subprocess.run(command, check=False).returncode:
            raise ValueError("a benchmark failed; its output is above")
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


def _write_samples(options: argparse.Namespace, images) -> None:
    import numpy as np
    from PIL import Image

    with whole(options.out / "samples.npy") as (partial,):
        np.save(partial, images)
    for i, image in enumerate((images * 255).round().astype(np.uint8)):
        with whole(options.out / f"sample_{i:04}.png") as (partial,):
            Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(partial)
    settings = {key: str(value) for key, value in vars(options).items() if key not in ("run", "checkpoints")}
    settings["checkpoints"] = [str(path) for path in options.checkpoints]
    write_json(options.out / "samples.json", settings)
    print(f"{len(images)} samples: {options.out / 'samples.npy'} and PNG files beside it")
