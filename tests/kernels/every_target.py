"""Every kernel compiled in full for every GPU, which takes minutes: ``make test-gpu-build``, and not ``make test``."""

import re

import pytest

from fastens import _build
from tests.kernels.test_ahead_of_time import check_compiled, needs_triton
from tests.kernels.test_cuda_library import needs_nvcc

MAX_SPILL = 96  # bytes a thread: a few kernels of 16 members reach the 255 registers that a thread has


@needs_triton
@pytest.mark.parametrize("capability", _build.CUDA_ARCHITECTURES)
def test_triton_kernels_compile_without_spills(capability):
    check_compiled(capability)


@needs_nvcc
def test_cuda_library_builds_and_keeps_to_registers():
    root = _build.source_root().parent
    library = _build.build("cuda", root / "build" / "cuda", work_dir=root / "build" / "cuda")
    assert library.stat().st_size > 0
    logs = "".join(path.read_text() for path in (root / "build" / "cuda").glob("*.log"))
    assert set(re.findall(r"for 'sm_(\d+)'", logs)) == {str(arch) for arch in _build.CUDA_ARCHITECTURES}
    kernels = re.findall(r"Compiling entry function '(\w+)'", logs)
    assert sum("reduce_kernel" in name for name in kernels) > 1000  # 4 dtypes, 5 rules, K of 1 to 16, 3 targets
    assert max(int(n) for n in re.findall(r"Used (\d+) registers", logs)) <= 255
    assert max(int(n) for n in re.findall(r"(\d+) bytes spill stores", logs)) <= MAX_SPILL
    assert "warning" not in logs
