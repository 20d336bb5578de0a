"""Build the native libraries where a compiler and torch are at hand; install pure Python otherwise, and say so."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
TORCH_GLIBC = (2, 28)  # what torch's own wheels ask for
NEWEST_GLIBCXX = (3, 4, 24)  # of the libstdc++ that manylinux_2_28 promises


def build_libraries(package: Path) -> None:
    """Compile ``csrc`` into ``package/_lib``, in a process that sees the torch of the target environment.

    Under build isolation torch is not importable, but the environment that asked for the build may have it: its
    site-packages is put behind the isolated path.
    """
    site = sysconfig.get_paths(vars={"base": sys.prefix, "platbase": sys.prefix})["purelib"]
    paths = [p for p in (os.environ.get("PYTHONPATH"), *sys.path, site) if p]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}
    builder, out_dir, work_dir = ROOT / "fastens" / "_build.py", package / "_lib", ROOT / "build" / "cpu"
    # -S: pip puts a sitecustomize on the path of an isolated build, which fails outside that build
    command = [sys.executable, "-S", str(builder), str(out_dir), str(work_dir)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        cause = result.stderr.strip()[-2000:]
        print(f"fastens: installing without native libraries: {cause}", file=sys.stderr)


class BuildWithLibraries(build_py):
    """``build_py`` that compiles the libraries, into the checkout when the install is editable.

    An installed package carries the C++ sources too, so that it can build where its installation could not.
    """

    def run(self) -> None:
        """Copy the package, then compile into the copy."""
        if self.editable_mode:
            super().run()
            build_libraries(ROOT / "fastens")
            return
        package = Path(self.build_lib) / "fastens"
        shutil.rmtree(package, ignore_errors=True)  # what an earlier build left must not be shipped
        super().run()
        shutil.copytree(ROOT / "csrc", package / "csrc")
        build_libraries(package)


class PlatformWheel(bdist_wheel):
    """A wheel for every Python on one platform where it carries libraries, for every platform where it does not."""

    def run(self) -> None:
        """Build first: only then is it known what the wheel carries."""
        self.run_command("build")
        self.root_is_pure = not self.libraries()
        super().run()

    def libraries(self) -> list[Path]:
        """The native libraries in the build folder."""
        return sorted((Path(self.get_finalized_command("build").build_lib) / "fastens" / "_lib").glob("*.so"))

    def get_tag(self) -> tuple[str, str, str]:
        """``py3-none``: the libraries use no header of Python."""
        tag = super().get_tag()
        if self.root_is_pure:
            return tag
        return ("py3", "none", manylinux(self.libraries()) or tag[2])


def manylinux(libraries: list[Path]) -> str | None:
    """Return the manylinux tag that the libraries' symbol versions allow, none where it cannot be established."""
    if sys.platform != "linux" or not shutil.which("objdump"):
        return None
    glibc = TORCH_GLIBC
    for library in libraries:
        symbols = subprocess.run(["objdump", "-T", library], capture_output=True, text=True, check=True).stdout
        for name, version in re.findall(r"\b(GLIBC|GLIBCXX)_([0-9.]+)", symbols):
            needed = tuple(map(int, version.split(".")))
            if name == "GLIBC":
                glibc = max(glibc, needed[:2])
            elif needed > NEWEST_GLIBCXX:
                return None
    return f"manylinux_{glibc[0]}_{glibc[1]}_{sysconfig.get_platform().removeprefix('linux-').replace('-', '_')}"


setup(cmdclass={"build_py": BuildWithLibraries, "bdist_wheel": PlatformWheel})
