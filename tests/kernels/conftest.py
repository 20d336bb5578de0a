"""The arithmetic of the CUDA kernels, compiled for the host."""

import ctypes
import subprocess

import pytest

from fastens import _build


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """host_<name>.cpp, compiled when it is first asked for."""
    from torch.utils.cpp_extension import include_paths

    folder, loaded = tmp_path_factory.mktemp("host"), {}

    def load(name):
        if name not in loaded:
            source = _build.source_root().parent / "tests" / "kernels" / f"host_{name}.cpp"
            built = folder / f"{name}.so"
            includes = [flag for path in include_paths() for flag in ("-isystem", path)]
            flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-Wno-unknown-pragmas", f"-I{_build.source_root()}"]
            try:
                compiler = _build.compiler()
            except _build.BuildError as error:
                pytest.skip(str(error))
            subprocess.run([compiler, *flags, *includes, str(source), "-o", str(built)], check=True)
            loaded[name] = ctypes.CDLL(str(built))
        return loaded[name]

    return load
