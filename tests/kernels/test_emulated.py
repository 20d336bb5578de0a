"""What Triton compiles for sm_90a computes what the reference does: small launches, emulated from their PTX."""

import json
import os
import subprocess
import sys

import pytest

from tests.kernels.test_ahead_of_time import needs_triton

TOLERANCE = 5e-3  # beside the largest number: bfloat16's rounding of what is convolved, and of the result
OF_MOMENTS = 1e-5
SAMPLE = [
    "triton: 8x8",
    "triton: long sums",  # in splits
    "triton: half the size",
    "triton wide: 256 outputs",
    "triton narrow: two images",
    "tma 128x128: several images",
    "tma 128x128: 16x16",
    "tma 128x128: narrow channels",  # boxes of 64 bytes
    "tma 128x128: tf32",
    "tma 128x128: 1x1",
    "tma 128x256: 256 outputs",
    "tma 64x128: half the size",  # boxes of five dimensions
    "tma 64x128: long sums",
    "halo 256x128: lines of 16",
    "halo 256x128: two images of lines",
    "sum of members",
    "attention",
    "linear",
    "linear group",
    "group norm",
    "aggregate",
]


REMOVED = [
    ("triton: 8x8", r"cp\.async\.wait_group[^;]*;"),  # loads may come after the products
    ("tma 128x128: 16x16", r"wgmma\.wait_group\.sync\.aligned[^;]*;"),  # loads may come before the products' end
    ("tma 128x128: 16x16", r"bar\.sync\s+0;"),  # what a warp reads may not be written yet
    ("tma 128x128: 16x16", r"@%p\d+ mbarrier\.arrive[^;]*;"),  # no end of a wait
    ("halo 256x128: lines of 16", r"wgmma\.wait_group\.sync\.aligned[^;]*;"),
    ("halo 256x128: lines of 16", r"bar\.sync\s+0;(?=\s*elect\.sync)"),  # lines are loaded anew that a warp multiplies
]


@pytest.fixture(scope="module")
def rows():
    """What ``python -m tests.kernels.emulated`` prints of the sample, whole and with what is removed: one process."""
    return emulated(*SAMPLE, *(x for pair in REMOVED for x in ("--without", *pair)))


def emulated(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.emulated", *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return list(map(json.loads, result.stdout.splitlines()))


def right(row):
    """Whether a result is the reference's; of a convolution also the moments of its result."""
    limits = [TOLERANCE, OF_MOMENTS] if ": " in row["launch"] else [TOLERANCE] * len(row.get("errors", ()))
    return "errors" in row and all(error <= limit for error, limit in zip(row["errors"], limits, strict=True))


@pytest.mark.gpu_compiler
@needs_triton
def test_compiled_code_computes_what_the_reference_does(rows):
    rows = [row for row in rows if row["removed"] is None]
    assert {(row["launch"], row["loads"]) for row in rows} == {
        (name, at) for name in SAMPLE for at in ("early", "late")
    }
    for row in rows:
        assert right(row), row
        assert "long sums" not in row["launch"] or row["splits"] > 1, row


@pytest.mark.gpu_compiler
@needs_triton
@pytest.mark.parametrize(("name", "removed"), REMOVED)
def test_the_emulator_sees_what_is_missing(rows, name, removed):
    rows = [row for row in rows if (row["launch"], row["removed"]) == (name, removed)]
    assert {row["loads"] for row in rows} == {"early", "late"}
    assert not all(map(right, rows)), rows
