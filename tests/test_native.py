"""The native library: built where it can be, loaded where it was built, and explained where it is not."""

import shutil
import subprocess
import sys

import pytest

import fastens
from fastens import _build, _native
from tests.fresh import python

SOURCE = """
#include <torch/csrc/stable/library.h>
#include "{header}"
STABLE_TORCH_LIBRARY(fastens_probe, m) {{ m.def("probe(Tensor x) -> Tensor"); }}
"""


def has_compiler():
    try:
        return bool(_build.compiler())
    except _build.ToolMissing:
        return False


needs_compiler = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")


@needs_compiler
def test_is_loaded_where_there_is_a_compiler():
    assert _native.status() == "available", "run `make build/native`"
    assert fastens.backends()["native"] == "available"


@needs_compiler
def test_has_every_kernel_that_the_ops_declare():
    from fastens.ops import all_ops

    on_cuda_alone = {"aggregate_update"}
    for op in all_ops().values():
        if op.name not in on_cuda_alone:
            assert "native" not in op.kernels or _native.has_kernel(op.kernels["native"]), op.name


# Of the buffer protocol, the interpreter lock, lists and dictionaries: in the stable ABI since 3.11.
_CPP = tuple(f"ZN{const}{space}" for const in ("", "K") for space in ("2at", "3c10", "5torch"))
STABLE = set(
    """PyBuffer_Release PyDict_GetItemWithError PyDict_Next PyDict_Size PyEval_RestoreThread PyEval_SaveThread
    PyList_GetItem PyList_Size PyObject_GetBuffer""".split()
)


@needs_compiler
@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump")
def test_one_library_serves_every_python():
    """It asks Python for what all versions have, weakly, and torch for its stable ABI."""
    assert _native.load()
    command = ["objdump", "-T", str(_native._loaded["cpu"])]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    needed = {line.split()[-1]: line.split()[1] for line in lines if "*UND*" in line}
    assert {name for name in needed if name.lstrip("_").startswith("Py")} == STABLE
    changing = [name for name in needed if name.lstrip("_").startswith(("Py", *_CPP))]
    assert {needed[name] for name in changing} == {"w"}  # it loads without, and asks before it calls


@pytest.fixture
def sources(tmp_path, monkeypatch):
    root = tmp_path / "a folder" / "csrc"
    (root / "cpu" / "family").mkdir(parents=True)
    for name in ("one.cpp", "family/one.cpp"):
        (root / "cpu" / name).write_text(f'#include "{"../" * (1 + name.count("/"))}shared.h"\n')
    (root / "shared.h").write_text("#pragma once\n")
    monkeypatch.setattr(_build, "source_root", lambda: root)
    return root


@needs_compiler
def test_builds_what_changed_and_no_more(sources, tmp_path):
    work, out = tmp_path / "work", tmp_path / "out"
    library = _build.build_cpu(out, work_dir=work)
    assert library == out / _build.LIBRARY_NAME
    assert [path.name for path in out.iterdir()] == [_build.LIBRARY_NAME]
    before = {path.name: path.stat().st_mtime_ns for path in work.glob("*.o")}
    assert len(before) == 2
    (sources / "cpu" / "one.cpp").write_text('#include "../shared.h"\nint changed() { return 1; }\n')
    _build.build_cpu(out, work_dir=work)
    changed = {name for name, time in before.items() if (work / name).stat().st_mtime_ns != time}
    assert changed == {"one.o"}


@needs_compiler
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
@pytest.mark.parametrize("shared", [False, True])
def test_a_kernel_has_no_function_that_instruction_sets_could_share(shared, sources, tmp_path):
    (sources / "kernels" / "family").mkdir(parents=True)
    (sources / "isa").mkdir()
    levels = (
        '#define FASTENS_LEVELS(LEVEL) LEVEL(vectors, false, "-funroll-loops", "none") LEVEL(scalars, false, "", "")'
    )
    (sources / "isa" / "levels.h").write_text(levels + "\n")
    kept = "inline" if shared else "static"  # the address is taken: it cannot be inlined alone
    text = f"{kept} int kernel() {{ return 1; }}\nnamespace FASTENS_LEVEL {{ extern int (*const found)(); }}\n"
    text += "int (*const FASTENS_LEVEL::found)() = kernel;\n"
    (sources / "kernels" / "family" / "one.cpp").write_text(text)
    if shared:
        with pytest.raises(_build.BuildError, match=r"W kernel\(\)"):
            _build.build_cpu(tmp_path / "out")
    else:
        work = tmp_path / "work"
        _build.build_cpu(tmp_path / "out", work_dir=work)
        assert {path.name for path in work.glob("kernels*.o")} == {
            "kernels-family-one-vectors.o",
            "kernels-family-one-scalars.o",
        }


@needs_compiler
def test_compile_error_shows_the_compilers_words(sources, tmp_path):
    (sources / "cpu" / "one.cpp").write_text("int broken(;\n")
    with pytest.raises(_build.BuildError, match=r"one\.cpp:1.*error") as raised:
        _build.build_cpu(tmp_path)
    assert not isinstance(raised.value, _build.ToolMissing)


def test_fingerprint_follows_sources_and_headers(sources):
    seen = {_build.fingerprint()}
    for path in ("cpu/family/one.cpp", "shared.h"):
        (sources / path).write_text("// changed\n")
        seen.add(_build.fingerprint())
    assert len(seen) == 3


def test_missing_tools_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "/nonexistent")
    with pytest.raises(_build.ToolMissing, match=r"\$CXX is '/nonexistent'"):
        _build.compiler()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(_build.ToolMissing, match="no C\\+\\+ compiler"):
        _build.compiler()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setitem(sys.modules, "ninja", None)
    with pytest.raises(_build.ToolMissing, match="pip install ninja"):
        _build.ninja()


def test_the_environment_s_ninja_comes_first(monkeypatch, tmp_path):
    """Whatever the path of a build, an installation's or ``make``'s: another ninja would compile everything again."""
    for folder in ("environment", "system"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "ninja").touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "environment" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "system"))
    assert _build.ninja() == str(tmp_path / "environment" / "ninja")
    (tmp_path / "environment" / "ninja").unlink()
    assert _build.ninja() == str(tmp_path / "system" / "ninja")


@pytest.mark.parametrize("damage", ["absent", "no library"])
def test_without_the_library_the_reference_serves_and_says_why(damage, tmp_path, monkeypatch):
    package = tmp_path / "_lib"
    package.mkdir()
    if damage == "no library":
        (package / _build.LIBRARY_NAME).write_bytes(b"no library")
    monkeypatch.setattr(_native, "PACKAGE_DIR", package)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    why = _native._load.__wrapped__()
    assert str(package / _build.LIBRARY_NAME) in why
    assert ("does not load" in why) == (damage == "no library")
    assert not has_compiler() or "python -m fastens._native" in why


def test_finds_a_library_in_the_users_cache(tmp_path, monkeypatch):
    built = _native.PACKAGE_DIR / _build.LIBRARY_NAME
    if not built.is_file():
        pytest.skip("no library was built")
    monkeypatch.setattr(_native, "PACKAGE_DIR", tmp_path / "_lib")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    _native.cache_dir().mkdir(parents=True)
    (_native.cache_dir() / _build.LIBRARY_NAME).symlink_to(built)
    assert _native._load.__wrapped__() is None


LIGHT = """_build _native _version adapters adaptive aggregation by_rows capture device draws dropout engine ensemble
    files fold holders internal kernels laplace members methods modes network ops outputs parameterisation pickled plan
    program reference refusals report reproducible rules schedules scopes settings summary through_forward trace
    views""".split()


def run_python(code):
    result = python(code)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_import_is_light():
    code = """
import torch, sys
held = set(sys.modules)
import fastens
new = {name: getattr(module, "__file__", None) or "" for name, module in sys.modules.items() if name not in held}
print(*{name.partition(".")[0] for name, file in new.items() if "site-packages" in file})
print(*({"torch._dynamo", "torch._inductor"} & set(new)))
print(*sorted({name.split(".")[1] for name in new if name.startswith("fastens.")}))
"""
    of_others, of_torch, own = run_python(code)
    assert set(of_others.split()) <= {"torch", "numpy", "fastens"}
    assert of_torch == ""
    assert set(own.split()) <= set(LIGHT)


def test_parts_are_imported_when_they_are_named():
    code = """
import fastens, sys
names = set(fastens.__all__)
assert names <= set(dir(fastens)), names - set(dir(fastens))
assert "fastens.tabular" not in sys.modules
print(fastens.tabular.accelerate.__name__, fastens.Forest.__name__, fastens.evaluation.Denoiser.__name__)
print(fastens.training.training_step.__name__, fastens.samplers.Sampler.__name__)
print(*(sorted(dir(fastens.interop))), fastens.interop.edm.__name__, callable(fastens.laplace))
print(*[name for name in names if not hasattr(fastens, name)], hasattr(fastens, "evaluations"))
"""
    first, second, interop, others = run_python(code)
    assert first == "accelerate Forest Denoiser"
    assert second == "training_step Sampler"
    assert {"diffusers", "edm", "k_diffusion", "fastens.interop.edm", "True"} <= set(interop.split())
    assert others == "False"
