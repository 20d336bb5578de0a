"""The CUDA library builds without a GPU, little optimised; every_target.py optimises it in full, for every target."""

import re
import subprocess
import sys

import pytest
import torch

from fastens import _build

try:
    NO_COMPILER = "" if _build.nvcc() else "no nvcc"
except _build.BuildError as error:
    NO_COMPILER = str(error)


needs_nvcc = pytest.mark.skipif(bool(NO_COMPILER), reason=NO_COMPILER or "nvcc found")


@pytest.mark.gpu_compiler
@needs_nvcc
def test_compiles_without_warnings():
    work_dir = _build.source_root().parent / "build" / "cuda-quick"
    library = _build.build("cuda", work_dir / "out", work_dir=work_dir, quick=True)
    assert library.stat().st_size > 0
    logs = "".join(path.read_text() for path in work_dir.glob("*.log"))
    assert set(re.findall(r"for 'sm_(\d+)'", logs)) == {str(_build.CUDA_ARCHITECTURES[0])}
    assert "warning" not in logs
    assert b"\0libtorch_cuda.so\0" in library.read_bytes()  # where the loader finds what the library calls
    if torch.version.cuda is not None:  # it loads without a GPU too
        code = (
            "import torch\nfrom fastens.ops import all_ops\nops = all_ops()\n"
            f"torch.ops.load_library({str(library)!r})\n"
            "names = [op.kernels['native'] for op in ops.values() if 'native' in op.kernels]\n"
            "has = torch._C._dispatch_has_computed_kernel_for_dispatch_key\n"
            "print([name for name in names if has(f'fastens::{name}', 'CUDA')])"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        for op in ("aggregate", "aggregate_update", "member_variance", "dropout"):
            assert f"_{op}_native" in result.stdout
