"""Build the CPU library where a compiler and torch are at hand; install pure Python otherwise, and say so."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def build_library(package: Path) -> None:
    """Compile ``csrc/cpu`` into ``package/_lib``, in a process that sees the torch of the target environment.

    Under build isolation torch is not importable, but the environment that asked for the build may have it: its
    site-packages is put behind the isolated path.
    """
    if not any((ROOT / "csrc" / "cpu").glob("*.cpp")):
        return
    site = sysconfig.get_paths(vars={"base": sys.prefix, "platbase": sys.prefix})["purelib"]
    paths = [p for p in (os.environ.get("PYTHONPATH"), *sys.path, site) if p]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}
    # -S: pip puts a sitecustomize on the path of an isolated build, which fails outside that build
    builder, out_dir, work_dir = ROOT / "fastens" / "_build.py", package / "_lib", ROOT / "build" / "cpu"
    command = [sys.executable, "-S", str(builder), str(out_dir), str(work_dir)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        print(f"fastens: installing without the native library: {result.stderr.strip()[-2000:]}", file=sys.stderr)


class BuildWithLibrary(build_py):
    """``build_py`` that also compiles the library, into the checkout when the install is editable."""

    def run(self) -> None:
        """Compile, then copy the package."""
        build_library(ROOT / "fastens")
        super().run()


setup(cmdclass={"build_py": BuildWithLibrary})
