"""Triton kernels compile without a GPU, within these registers, and without spilling: a sample, for every target."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from fastens import _build

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

MAX_REGISTERS = 192  # 10 warps of a multiprocessor's 64 K registers; a warp of most kernels takes half of it
MAX_STACK = 16  # bytes: sm_100 keeps one 8-byte temporary of a few kernels there; arrays and spills are larger
MAX_SHARED = 99 * 1024  # bytes, what sm_86 and sm_89 give a block


@needs_triton
@pytest.mark.parametrize("capability", _build.CUDA_ARCHITECTURES)
def test_a_sample_compiles_without_spills(capability):
    check_compiled(capability, "sample")


def check_compiled(capability, *options):
    """Compile in a process of its own, and compare what each kernel takes with the limits."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.ahead_of_time", str(capability), *options]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)
    assert {row["kernel"] for row in rows} == {
        "aggregate_kernel", "smallest_kernel", "partial_kernel", "group_norm_kernel", "layer_norm_kernel",
        "linear_kernel", "dropout_kernel",
    }  # fmt: skip
    for row in rows:
        assert row["registers"] <= MAX_REGISTERS, row
        assert row["stack"] <= MAX_STACK, row
        assert row["local"] == 0, row
        assert row["shared"] <= MAX_SHARED, row
        if row["kernel"] in ("aggregate_kernel", "smallest_kernel"):
            assert row["widest load"] == 16, row
    tensor_cores = {80: "mma", 90: "wgmma", 100: "tcgen05"}[capability]
    assert {row["tensor cores"] for row in rows if row["launch"] == "linear bf16 M=512"} == {tensor_cores}
