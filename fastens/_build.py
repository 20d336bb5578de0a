"""Compile the native libraries with ninja; shared by ``setup.py`` and :mod:`fastens._native`.

The module imports neither :mod:`fastens` nor, before a function is called, :mod:`torch`, so a build script can load
it by path: ``python fastens/_build.py [--cuda] OUT_DIR [WORK_DIR]``. The CPU and the CUDA library use the libtorch
stable ABI and no header of Python: one build serves torch 2.11 onward and every Python. The CUDA library is built
without a GPU and without CUDA's torch.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple

LIBRARY_NAME = "libfastens_cpu.so"
# Folders of csrc/kernels whose products and sums are rounded one after the other, as in the libraries that they follow.
NOT_FUSED = ("forest",)
MULTIPLY_BFLOAT16 = ("program",)  # folders that have kernels of their own where only such products are new
LIBRARY_NAMES = {"cpu": LIBRARY_NAME, "cuda": "libfastens_cuda.so"}
CUDA_ARCHITECTURES = (80, 90, 100)  # machine code for each; PTX of the last serves what comes after
TORCH_TARGET_VERSION = "0x020b000000000000"
SANITIZERS = "address,undefined"


CANNOT_BUILD_HERE = 3  # exit status; a compile error is 1


class BuildError(RuntimeError):
    """A library could not be built; the message carries the cause and the remedy."""


class ToolMissing(BuildError):
    """A compiler, ninja or torch is missing, or the platform is one that the library does not support."""


def source_root() -> pathlib.Path:
    """Return the ``csrc`` folder: beside this file in an installed package, one level up in a checkout.

    Raises:
        BuildError: neither exists.
    """
    package = pathlib.Path(__file__).resolve().parent
    for candidate in (package / "csrc", package.parent / "csrc"):
        if (candidate / "cpu").is_dir():
            return candidate
    raise BuildError(f"no csrc/cpu beside {package}: this installation carries no C++ sources; install from a checkout")


def sources(device: str = "cpu") -> list[pathlib.Path]:
    """Return every source of a device type's library, sorted: of the CPU's without the kernels."""
    folders, suffix = (("cuda",), "cu") if device == "cuda" else (("cpu", "isa"), "cpp")
    return sorted(path for folder in folders for path in (source_root() / folder).rglob(f"*.{suffix}"))


def kernels() -> list[pathlib.Path]:
    """Return every source that is compiled once for each instruction set, sorted."""
    return sorted((source_root() / "kernels").rglob("*.cpp"))


class Level(NamedTuple):
    """An instruction set that kernels are compiled for: a row of ``csrc/isa/levels.h``."""

    name: str
    products: bool  # whether products of bfloat16 are all that the next row lacks
    flags: str


def levels(cxx: str) -> list[Level]:
    """Return the instruction sets of the machine that a compiler compiles for, the best first.

    Raises:
        BuildError: it cannot read the table.
    """
    if not kernels():
        return []
    table = '#include "isa/levels.h"\nFASTENS_LEVELS(FASTENS_ROW)\n'
    command = [*shlex.split(cxx), "-E", "-P", f"-I{source_root()}", "-x", "c++", "-"]
    result = subprocess.run(command, input=table, capture_output=True, text=True, check=False)
    rows = re.findall(r'FASTENS_ROW\((\w+), (\w+), "(.*?)", ".*?"\)', result.stdout)
    if result.returncode or not rows:
        raise BuildError(f"{cxx} cannot read csrc/isa/levels.h:\n{result.stderr or result.stdout}")
    return [Level(name, products == "true", flags) for name, products, flags in rows]


def headers() -> list[pathlib.Path]:
    """Return every header the sources may include, sorted."""
    return sorted(source_root().glob("**/*.h"))


def fingerprint() -> str:
    """Return 16 hex digits that change with the sources, the headers and the flags: the key of a cached build."""
    flags = [*compile_flags(), *cuda_flags(), *link_flags(), *NOT_FUSED, *MULTIPLY_BFLOAT16, platform.machine()]
    digest = hashlib.sha256(" ".join(flags).encode())
    for path in [*sources(), *kernels(), *sources("cuda"), *headers()]:
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def compiler() -> str:
    """Return the C++ compiler: ``$CXX``, else the first of c++, g++, clang++ on the path.

    Raises:
        ToolMissing: there is none, or ``$CXX`` names none.
    """
    chosen = os.environ.get("CXX")
    if chosen:
        if not shutil.which(chosen.split()[0]):
            raise ToolMissing(f"no C++ compiler: $CXX is {chosen!r}, which is no program here; unset it or correct it")
        return chosen
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return name
    raise ToolMissing("no C++ compiler: install g++ or clang++, or point $CXX at one")


def nvcc() -> str:
    """Return the CUDA compiler: ``$CUDACXX``, that of ``$CUDA_HOME``, on the path, or of /usr/local/cuda.

    Raises:
        BuildError: there is none.
    """
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [os.environ.get("CUDACXX"), f"{home}/bin/nvcc" if home else None, "nvcc", "/usr/local/cuda/bin/nvcc"]
    for candidate in candidates:
        if candidate and shutil.which(candidate):
            return candidate
    raise ToolMissing("no nvcc: install the CUDA toolkit, or point $CUDA_HOME at it")


def ninja() -> str:
    """Return the ninja program: beside this Python, on the path, or of the ``ninja`` distribution.

    The environment's own comes first: ninja builds everything again that another version has built.

    Raises:
        ToolMissing: there is none.
    """
    if found := shutil.which("ninja", path=str(pathlib.Path(sys.executable).parent)) or shutil.which("ninja"):
        return found
    try:
        from ninja import BIN_DIR
    except ImportError:
        raise ToolMissing("no ninja: `pip install ninja`") from None
    return str(pathlib.Path(BIN_DIR) / "ninja")


def compile_flags() -> list[str]:
    """Return the flags of every source of the CPU, without include paths.

    IEEE semantics are kept: no ``-ffast-math``. The two ``-fno-`` flags change no value; they drop ``errno`` and the
    floating-point exception flags, which otherwise keep selects and square roots from being vectorised.
    """
    return [
        "-std=c++20",
        "-O3",
        "-fPIC",
        "-fvisibility=hidden",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-Wall",
        "-Wextra",
        "-Wno-unknown-pragmas",
        "-Wno-psabi",  # 64-byte vectors are passed between inlined functions only
        *(sanitizer_flags() if os.environ.get("FASTENS_SANITIZE") else ()),
    ]


def sanitizer_flags() -> list[str]:
    """Return the flags of a library that stops at the first error of memory or undefined behaviour."""
    return ["-O1", "-g", "-fno-omit-frame-pointer", f"-fsanitize={SANITIZERS}", f"-fno-sanitize-recover={SANITIZERS}"]


def cuda_flags(quick: bool = False) -> list[str]:
    """Return the flags of every CUDA source, without include paths; IEEE semantics, no ``--use_fast_math``.

    Args:
        quick: optimise little, and for the oldest target alone, which has the fewest instructions, to learn in a minute
            or two whether it compiles.
    """
    oldest, newest = CUDA_ARCHITECTURES[0], CUDA_ARCHITECTURES[-1]
    codes = [f"arch=compute_{a},code=sm_{a}" for a in ((oldest,) if quick else CUDA_ARCHITECTURES)]
    if not quick:
        codes.append(f"arch=compute_{newest},code=compute_{newest}")
    return [
        "-std=c++20",
        *(["-O1", "-Xcicc=-O1", "-Xptxas=-O1"] if quick else ["-O3"]),
        "--expt-relaxed-constexpr",
        *(f"-gencode={code}" for code in codes),
        "-cudart=static",
        "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall",
        "-Xptxas=-v",
        "-DUSE_CUDA",
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
    ]


def link_flags() -> list[str]:
    """Return the flags of the link, without library paths; no rpath, since torch is loaded before the library is."""
    if sys.platform == "darwin":
        return ["-dynamiclib", "-undefined", "dynamic_lookup"]
    sanitizers = [f"-fsanitize={SANITIZERS}"] if os.environ.get("FASTENS_SANITIZE") else []
    return ["-shared", "-Wl,--as-needed", *sanitizers]


def build_cpu(out_dir: pathlib.Path, verbose: bool = False, work_dir: pathlib.Path | None = None) -> pathlib.Path:
    """Compile ``csrc/cpu``, ``csrc/isa`` and ``csrc/kernels``: :func:`build` for the CPU."""
    return build("cpu", out_dir, verbose, work_dir)


def build(
    device: str,
    out_dir: pathlib.Path,
    verbose: bool = False,
    work_dir: pathlib.Path | None = None,
    quick: bool = False,
) -> pathlib.Path:
    """Compile a device type's sources into ``out_dir / LIBRARY_NAMES[device]`` and return that path.

    Args:
        device: "cpu" or "cuda".
        out_dir: folder of the library; made where it does not exist.
        verbose: print every command.
        work_dir: folder that keeps the objects, which makes the next build incremental; by default a temporary one.
        quick: of the CUDA library, build a version to test that it compiles: see :func:`cuda_flags`.

    Raises:
        BuildError: no compiler, no ninja, no torch, an unsupported platform, or a compile error (with its output).
    """
    if sys.platform == "win32":
        raise ToolMissing("the libraries are built with g++ or clang++ on Linux and macOS; Windows uses the reference")
    import fcntl  # which Windows lacks

    if work_dir is None:
        with tempfile.TemporaryDirectory(prefix="fastens-build-") as temporary:
            return build(device, out_dir, verbose, pathlib.Path(temporary), quick)
    name, work_dir = LIBRARY_NAMES[device], pathlib.Path(work_dir).resolve()
    work_dir.mkdir(parents=True, exist_ok=True)
    with (work_dir / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another build of this folder ends first, and leaves little to do
        (work_dir / "build.ninja").write_text(cuda_ninja_file(quick) if device == "cuda" else ninja_file(name))
        command = [ninja(), "-C", str(work_dir), *(["-v"] if verbose else [])]
        result = subprocess.run(command, capture_output=not verbose, text=True, check=False)
    if result.returncode:
        output = "" if verbose else f":\n{result.stdout}{result.stderr}"
        raise BuildError(f"ninja failed in {work_dir} (exit status {result.returncode}){output}")
    out_dir = pathlib.Path(out_dir).resolve()
    out_dir.mkdir(parents=True, exist_ok=True)
    library = out_dir / name
    # A process that has the old library mapped keeps its inode: replace the name, never the bytes.
    staged = out_dir / f".{name}.{os.getpid()}"
    shutil.copy2(work_dir / name, staged)
    staged.replace(library)
    return library


def kernel_flags(source: pathlib.Path, level: Level) -> list[str]:
    """Return what a source of ``csrc/kernels`` is compiled with besides :func:`compile_flags`, for one level."""
    fused = "off" if source.relative_to(source_root() / "kernels").parts[0] in NOT_FUSED else "fast"
    return [*level.flags.split(), f"-ffp-contract={fused}", f"-DFASTENS_LEVEL={level.name}"]


def kernel_objects(cxx: str) -> dict[str, tuple[pathlib.Path, list[str]]]:
    """Return, by object, every kernel's source and its own flags: one object for each of :func:`levels` that it has."""
    root = source_root() / "kernels"
    objects = {}
    for level in levels(cxx):
        for source in kernels():
            path = source.relative_to(root)
            if not level.products or path.parts[0] in MULTIPLY_BFLOAT16:
                name = "-".join(("kernels", *path.with_suffix("").parts, level.name))
                objects[f"{name}.o"] = (source, kernel_flags(source, level))
    return objects


def ninja_file(name: str) -> str:
    """Return the text of ``build.ninja``: one object per source and of a kernel's for each instruction set, one link.

    Kernels are compiled without torch's headers. A function that their object holds weakly would be in the objects of
    other instruction sets too, and the linker would keep any one of them for all: that is an error of the build.

    Args:
        name: file name of the library.

    Raises:
        BuildError: no compiler, no torch or no sources.
    """
    try:
        from torch.utils.cpp_extension import include_paths, library_paths
    except ImportError as error:
        raise ToolMissing(f"building needs torch, which does not import here: {error}") from error
    root, cxx = source_root(), compiler()
    if not sources():
        raise BuildError(f"no sources of {name} in {root}")
    system = [f"-isystem {_quoted(path)}" for path in include_paths()]
    libraries = [f"-L{_quoted(path)}" for path in library_paths()]
    weak = "true" if os.environ.get("FASTENS_SANITIZE") else "! nm -C $out 2>/dev/null | grep ' W '"
    lines = [
        "ninja_required_version = 1.3",
        f"cxx = {cxx}",
        f"cflags = {' '.join([*compile_flags(), f'-I{_quoted(root)}'])}",
        f"torch = -DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION} {' '.join(system)}",
        f"ldflags = {' '.join([*link_flags(), *libraries, '-ltorch_cpu', '-lc10'])}",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $cflags $torch -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule compile_kernel",
        f"  command = $cxx -MMD -MF $out.d $cflags $own -c $in -o $out && {weak}",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $cxx $in $ldflags -o $out",
    ]
    objects = []
    for source in sources():
        parts = source.relative_to(root).with_suffix("").parts
        objects.append(f"{'-'.join(parts[1:] if parts[0] == 'cpu' else parts)}.o")
        lines.append(f"build {objects[-1]}: compile {_escaped(source)}")
    for target, (source, own) in kernel_objects(cxx).items():
        objects.append(target)
        lines += [f"build {target}: compile_kernel {_escaped(source)}", f"  own = {' '.join(own)}"]
    return "\n".join([*lines, f"build {name}: link {' '.join(objects)}", f"default {name}", ""])


def cuda_ninja_file(quick: bool = False) -> str:
    """Return the text of the CUDA library's ``build.ninja``; every compilation leaves a log beside its object.

    Raises:
        BuildError: no nvcc or no torch.
    """
    try:
        from torch.utils.cpp_extension import include_paths, library_paths
    except ImportError as error:
        raise ToolMissing(f"building needs torch, which does not import here: {error}") from error
    paths = [f"-I{_quoted(source_root())}", *(f"-isystem {_quoted(path)}" for path in include_paths())]
    libraries = [f"-L{_quoted(path)}" for path in library_paths()]
    objects = {f"{path.stem}.o": _escaped(path) for path in sources("cuda")}
    name = LIBRARY_NAMES["cuda"]
    # A torch with CUDA, whose C shim the library calls, need not be here: an empty library of the same name makes the
    # loader look the symbols up in the one that the process has loaded.
    return "\n".join(
        [
            "ninja_required_version = 1.3",
            f"cxx = {nvcc()}",
            f"cflags = {' '.join([*cuda_flags(quick), *paths])}",
            f"host = {compiler()}",
            f"ldflags = {' '.join(['-shared', '-cudart=static', *libraries, '-ltorch_cpu', '-lc10'])}",
            "rule compile",
            "  command = $cxx -MD -MF $out.d $cflags -c $in -o $out > $out.log 2>&1 || (cat $out.log; false)",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule empty",
            "  command = $host -shared -Wl,-soname,$out -x c++ /dev/null -o $out",
            "rule link",
            "  command = $cxx $in $ldflags -Xlinker --no-as-needed -L. -ltorch_cuda -o $out",
            *(f"build {each}: compile {source}" for each, source in objects.items()),
            "build libtorch_cuda.so: empty",
            f"build {name}: link {' '.join(objects)} | libtorch_cuda.so",
            f"default {name}",
            "",
        ]
    )


def _quoted(path: str | pathlib.Path) -> str:
    return '"' + str(path).replace("$", "$$") + '"'


def _escaped(path: pathlib.Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


if __name__ == "__main__":
    device = "cuda" if "--cuda" in sys.argv else "cpu"
    folders = [pathlib.Path(argument) for argument in sys.argv[1:] if argument != "--cuda"]
    if len(folders) not in (1, 2):
        sys.exit("usage: python fastens/_build.py [--cuda] OUT_DIR [WORK_DIR]")
    try:
        print(build(device, folders[0], True, folders[1] if folders[1:] else None))
    except ToolMissing as error:
        print(error, file=sys.stderr)
        sys.exit(CANNOT_BUILD_HERE)
    except BuildError as error:
        sys.exit(str(error))
