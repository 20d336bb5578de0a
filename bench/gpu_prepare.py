"""What a GPU machine need not compile: kernels and the CUDA library, made beforehand on a machine without a GPU.

``python -m bench.gpu_prepare make [NETWORK:BATCH...]`` compiles the convolutions of these plans, in every way, and the
library into ``build/prepared``, which then travels with the tree; it needs the Triton of the GPU machine.
``python -m bench.gpu_prepare install CACHE`` puts them where they are looked up, and fails where Triton's keys there
are others: then everything is compiled again, and only time is lost.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import torch
import triton

from bench.gpu_launches import convolutions
from fastens import _build

PREPARED = Path("build/prepared")
LIBRARY = Path("fastens/_lib") / _build.LIBRARY_NAMES["cuda"]
STEPS = ("songunet:1", "songunet:16", "songunet:256", "ddpmpp:1", "ffhq256:1")
NEEDED = (".json", ".cubin")  # of the files that Triton keeps of a kernel


def compile_all(cache, steps):
    """Compile into Triton's cache what the plans of ``steps`` may launch; how many launches that were."""
    from bench.gpu_code import compiling
    from bench.gpu_ways import launched

    os.environ["TRITON_CACHE_DIR"] = str(cache)
    number = 0
    for step in steps:
        name, _, batch = step.partition(":")
        for conv in convolutions(name):
            with torch.backends.cudnn.flags(allow_tf32=True), compiling() as compiled:
                for call in launched(conv, int(batch), torch.bfloat16).values():
                    call()
                number += len(compiled)
            print(f"{step}: {conv}", flush=True)
    return number


def make(steps):
    """Fill ``build/prepared``."""
    cache = Path("build/prepared-cache").resolve()
    compile_all(cache, steps)
    shutil.rmtree(PREPARED, ignore_errors=True)
    for file in cache.glob("*/*"):
        if file.suffix in NEEDED and not file.name.startswith("__grp__"):
            (PREPARED / "triton" / file.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(file, PREPARED / "triton" / file.parent.name / file.name)
    try:
        shutil.copy(_build.build("cuda", PREPARED, True, Path("build/cuda").resolve()), PREPARED / LIBRARY.name)
    except _build.BuildError as error:
        print(f"no CUDA library: {error}", file=sys.stderr)
    (PREPARED / "made.json").write_text(json.dumps({"triton": triton.__version__, "first": steps[0]}) + "\n")
    size = sum(file.stat().st_size for file in PREPARED.rglob("*") if file.is_file())
    print(f"{PREPARED}: {len(list(PREPARED.glob('triton/*')))} kernels, {size / 2**20:.0f} MiB")


def install(cache):
    """Put kernels into a cache, and the library into the package; why they are of no use there, or none.

    A group's file names the paths of its files in full, so it is written anew.
    """
    for folder in PREPARED.glob("triton/*"):
        to = cache / folder.name
        to.mkdir(parents=True, exist_ok=True)
        files = {file.name: str((to / file.name).resolve()) for file in folder.iterdir()}
        for file in folder.iterdir():
            shutil.copy(file, to / file.name)
        for name in files:
            if name.endswith(".json"):
                (to / f"__grp__{name}").write_text(json.dumps({"child_paths": files}))
    if (PREPARED / LIBRARY.name).exists() and not LIBRARY.exists():
        LIBRARY.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PREPARED / LIBRARY.name, LIBRARY)
    before = {folder.name for folder in cache.iterdir() if any(folder.glob("*.cubin"))}
    compile_all(cache, [json.loads((PREPARED / "made.json").read_text())["first"]])
    missed = {folder.name for folder in cache.iterdir() if any(folder.glob("*.cubin"))} - before
    made = json.loads((PREPARED / "made.json").read_text())["triton"]
    return (
        f"{len(missed)} kernels had other keys; made with Triton {made}, here is {triton.__version__}" if missed else ""
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["make"]:
        make(sys.argv[2:] or STEPS)
    elif sys.argv[1:2] == ["install"] and len(sys.argv) == 3:
        if not (PREPARED / "made.json").exists():
            sys.exit(f"{PREPARED} is not there: nothing was prepared, and everything is compiled here")
        sys.exit(install(Path(sys.argv[2])) or None)
    else:
        sys.exit("usage: python -m bench.gpu_prepare make [NETWORK:BATCH...] | install CACHE")
