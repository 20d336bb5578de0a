"""The CUDA library builds without a GPU for every target, little optimised; every_target.py optimises it in full."""

import re

import pytest

from fastens import _build

try:
    NO_COMPILER = "" if _build.nvcc() else "no nvcc"
except _build.BuildError as error:
    NO_COMPILER = str(error)


needs_nvcc = pytest.mark.skipif(bool(NO_COMPILER), reason=NO_COMPILER or "nvcc found")


@needs_nvcc
def test_compiles_without_warnings():
    work_dir = _build.source_root().parent / "build" / "cuda-quick"
    library = _build.build("cuda", work_dir / "out", work_dir=work_dir, quick=True)
    assert library.stat().st_size > 0
    logs = "".join(path.read_text() for path in work_dir.glob("*.log"))
    assert set(re.findall(r"for 'sm_(\d+)'", logs)) == {str(arch) for arch in _build.CUDA_ARCHITECTURES}
    assert "warning" not in logs
