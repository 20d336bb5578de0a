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
MAX_REGISTERS_OF_PRODUCTS = 255  # one block of 8 warps: a convolution's tile of sums takes 64 of them, its input 32
PRODUCTS = (
    "conv2d_kernel", "conv2d_sum_kernel", "join_kernel", "linear_kernel", "linear_group_kernel", "attention_kernel"
)  # fmt: skip
MAX_STACK = 16  # bytes: sm_100 keeps one 8-byte temporary of a few kernels there; arrays and spills are larger
MAX_SHARED = 99 * 1024  # bytes, what sm_86 and sm_89 give a block
MAX_SHARED_OF_WIDE = 163 * 1024  # bytes: wide tiles are refused before sm_90, which gives a block more
MAX_SHARED_OF_DESCRIPTORS = 227 * 1024  # bytes, what compute capabilities 9.0 and 10.0 give a block
MAX_STACK_OF_WAVES = 56  # bytes: sine and cosine each keep seven words of 2/pi there, for the range of large arguments
WAVES = ("pointwise_kernel", "normal_kernel", "sampler_step_kernel")
MAX_STACK_OF_PRODUCTS = 96  # bytes: sm_80 spills a few numbers of a sum over members, sm_100 of the parts of split sums


@pytest.mark.gpu_compiler
@needs_triton
@pytest.mark.parametrize(
    "capability", [pytest.param(c, marks=() if c == 90 else pytest.mark.full) for c in _build.CUDA_ARCHITECTURES]
)
def test_a_sample_compiles_without_spills(capability):
    check_compiled(capability, "sample")


def in_process(module, *options):
    """What a process without Triton's interpreter prints."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", f"tests.kernels.{module}", *options]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.gpu_compiler
@needs_triton
def test_sizes_of_one_compile():
    """A norm of one place, say: a method of a tensor is none of the number that Triton makes of such an argument."""
    found = in_process("ones", "90")
    assert {"group_norm_kernel", "layer_norm_kernel", "conv2d_kernel", "pointwise_kernel"} <= {*found["compiled"]}
    assert found["errors"] == {}


def check_compiled(capability, *options):
    """Compile in a process of its own, and compare what each kernel takes with the limits."""
    rows = in_process("ahead_of_time", str(capability), *options)
    assert {row["kernel"] for row in rows} == {
        "aggregate_kernel", "smallest_kernel", "partial_kernel", "group_norm_kernel", "layer_norm_kernel",
        "linear_kernel", "linear_group_kernel", "dropout_kernel", "conv2d_kernel", "conv2d_sum_kernel",
        "maps_kernel", "normalise_kernel", "join_moments_kernel", "pointwise_kernel", "concatenate_kernel",
        "normal_kernel", "sampler_step_kernel", "attention_kernel", "draw_bits_kernel",
        "apply_bits_kernel", *(["conv2d_tma_kernel"] if capability >= 90 else []),
        *(["conv2d_halo_kernel"] if capability == 90 else []),
    }  # fmt: skip
    for row in rows:
        # where a kernel is launched beside the end of the one before, it waits before it reads or writes memory
        assert (row["overlaps"], row["waits"]) == ((capability >= 90,) * 2), row
        assert not row["complaint"], row  # of products that ptxas has serialised
        if row["kernel"] in ("conv2d_tma_kernel", "conv2d_halo_kernel"):
            check_descriptors(row, capability)
            continue
        products = row["kernel"] in PRODUCTS
        assert row["registers"] <= (MAX_REGISTERS_OF_PRODUCTS if products else MAX_REGISTERS), row
        stack = MAX_STACK_OF_WAVES if row["kernel"] in WAVES else MAX_STACK
        assert row["stack"] <= (MAX_STACK_OF_PRODUCTS if products and capability != 90 else stack), row
        assert row["local"] == 0, row
        assert row["shared"] <= (MAX_SHARED_OF_WIDE if " wide " in row["launch"] else MAX_SHARED), row
        if row["launch"] == "pointwise arithmetic":
            assert row["inexact"] == [], row
        if row["kernel"] in ("aggregate_kernel", "smallest_kernel"):
            assert row["widest load"] == 16, row
    tensor_cores = {80: "mma", 90: "wgmma", 100: "tcgen05"}[capability]
    products = [row for row in rows if row["kernel"] in ("linear_kernel", "conv2d_kernel") and "bf16" in row["launch"]]
    assert {row["tensor cores"] for row in products if row["launch"].endswith(("M=512", "B=16"))} == {tensor_cores}


def check_descriptors(row, capability):
    """Both operands are loaded in bulk and read from shared memory, and nothing is spilled."""
    assert row["registers"] <= MAX_REGISTERS_OF_PRODUCTS, row
    assert row["stack"] <= (0 if capability == 90 else MAX_STACK_OF_PRODUCTS), row
    assert row["local"] == 0, row
    assert row["shared"] <= MAX_SHARED_OF_DESCRIPTORS, row
    of_one_image = row["launch"].endswith(("32x32/1", "16x16/1"))  # whose results are 128 places or more
    if capability == 90 and of_one_image and row["launch"].startswith("tma 128x128 bf16"):  # two on a multiprocessor
        assert row["registers"] <= 65536 // (2 * 8 * 32), row
        assert 2 * (row["shared"] + 1024) <= MAX_SHARED_OF_DESCRIPTORS + 1024, row
    assert row["bulk loads"] > 0, row
    assert row["matrix loads"] == 0, row
    assert row["tensor cores"] == {90: "wgmma", 100: "tcgen05"}[capability], row
