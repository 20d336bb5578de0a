"""The machine code of convolutions as plans launch them: products in flight, no spills, wide accesses; a sample."""

import importlib.util
import json
import math
import os
import subprocess
import sys

import pytest

from fastens.device import MULTIPROCESSORS
from tests.kernels.test_ahead_of_time import MAX_REGISTERS_OF_PRODUCTS, MAX_SHARED_OF_DESCRIPTORS, needs_triton

SAMPLE = ("songunet", "256", "--sample", "9", "--ways", "triton", "triton wide", "tma 128x128", "tma 128x256")
OF_FLOAT32 = ("songunet", "16", "--dtype", "float32", "--sample", "12", "--ways", "triton", "triton wide")
OF_PRODUCTS = ("conv2d_kernel", "conv2d_tma_kernel", "conv2d_sum_kernel", "conv2d_halo_kernel")
BESIDE = {"tma 64x128": 2, "tma 128x128": 2, "tma 128x256": 1}  # blocks of a multiprocessor, at 16 bits


def read_rows(*arguments):
    """What ``python -m bench.gpu_ways`` reads, in a process of its own, for which nothing is interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.gpu_ways", *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    rows = list(map(json.loads, result.stdout.splitlines()))
    assert rows
    return rows


def check(row, itemsize=2):
    """Hold a kernel's code against what makes it fast; its loops are of products where it has any."""
    about = {name: value for name, value in row.items() if name not in ("loops", "loads")}
    assert not row["complaint"], about  # C7515: ptxas has serialised the products
    assert row["spilled"] == 0, about
    assert row["overlaps"], about  # and waits for the kernel before, before it reads or writes memory
    assert row["registers"] <= MAX_REGISTERS_OF_PRODUCTS, about
    assert row["shared"] <= MAX_SHARED_OF_DESCRIPTORS, about
    if row["kernel"] not in OF_PRODUCTS:
        return
    assert row["loops"], about
    size = row["constants"]
    places = size.get("PLACES") or size["TILE_H"] * size["TILE_W"]
    if size.get("ROWS", 1) * places >= 64:  # fewer are products of each warp
        assert row["of_warp_groups"], about
    threads = 32 * row["warps"]
    if row["outputs"] % (16 // itemsize) == 0:
        part = size.get("ROWS", 1) * places * min(size["BLOCK_N"], 64)  # of the sums, which are finished at a time
        widest = min(16, part * itemsize // threads)
        assert row["stores"].get(str(widest), 0) > 0, about
        assert min(map(int, row["stores"])) >= 4, about  # no element of a result in 16 bits is stored alone
    if "shared" not in row["convolution"]:  # of the three channels of an image, which no wide load takes
        assert row["in_flight"], (about, [loop["waits"] + loop["load_waits"] for loop in row["loops"]])
        loads = {
            name: n for loop in row["loops"] for name, n in loop["operations"].items() if name.startswith("LDGSTS")
        }
        narrow = {name: n for name, n in loads.items() if not name.endswith(".128")}
        allowed = 0
        if " norm" in row["convolution"]:  # its three maps: a number a channel, of each row
            allowed += 3 * max(1, size.get("ROWS", 1) * size["BLOCK_K"] // threads)
        if size["BLOCK_N"] * size["BLOCK_K"] * itemsize // threads < 16:  # weights of few columns
            allowed += 1
        assert sum(narrow.values()) <= allowed, (about, loads)
    of_one_image = "at 32x32" in row["convolution"] or "at 16x16" in row["convolution"]
    several = math.prod(row["grid"]) > MULTIPROCESSORS  # there are blocks for two at a time
    if itemsize == 2 and of_one_image and several and row["way"] in BESIDE:
        assert row["blocks"] >= BESIDE[row["way"]], about


@pytest.mark.gpu_compiler
@needs_triton
def test_a_sample_keeps_its_products_in_flight():
    rows = read_rows(*SAMPLE)
    assert {row["kernel"] for row in rows} > {"conv2d_kernel", "conv2d_tma_kernel"}
    for row in rows:
        check(row)


@pytest.mark.gpu_compiler
@needs_triton
def test_a_sample_of_float32_keeps_its_loads_in_flight():
    rows = read_rows(*OF_FLOAT32)
    assert "conv2d_kernel" in {row["kernel"] for row in rows}
    for row in rows:
        check(row, itemsize=4)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_products_of_each_warp_are_products():
    """A tile of few places has loops of other instructions, which wait for loads alone."""
    from bench.gpu_code import Code, parse

    lines = [
        ".L_x_2:", "        /*0010*/                   DEPBAR.LE SB0, 0x2 ;",
        "        /*0020*/                   HMMA.16816.F32.BF16 R24, R8, R4, R24 ;",
        "        /*0030*/                   LDGSTS.E.BYPASS.128 [R2], [R4.64] ;",
        "        /*0050*/               @P0 BRA `(.L_x_2) ;",
    ]  # fmt: skip
    (loop,) = parse("\n".join(lines))[1]
    assert (loop.products, loop.waits, loop.load_waits) == (((8, 16),), (), (2,))
    code = Code("k", (1,), {}, 4, 128, 0, 98304, "", True, 6, (loop,), {}, {})
    assert code.in_flight
    assert not code.of_warp_groups


LINES = {  # of a loop, in order
    "label": ".L_x_2:",
    "load": "        /*0010*/                   @UP0 UTMALDG.4D [UR8], [UR20] ;",
    "product": "        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;",
    "wait": "        /*0030*/                   WARPGROUP.DEPBAR.LE gsb0, {:#x} ;",
    "narrow store": "        /*0040*/                   STG.E.U16 [R2.64], R5 ;",
    "branch": "        /*0050*/               @P0 BRA `(.L_x_2) ;",
    "store": "        /*0060*/                   STG.E.128 [R2.64], R4 ;",
}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("in_flight", [0, 1])
def test_a_loop_that_drains_its_products_is_seen(monkeypatch, in_flight):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    from bench.gpu_code import Code, parse, width

    sass = "\n".join(LINES.values()).format(in_flight)
    instructions, loops = parse(sass)
    assert [name for name, _ in instructions][-1] == "STG.E.128"
    (loop,) = loops
    assert (loop.products, loop.waits, loop.instructions) == (((128, 16),), (in_flight,), 5)
    code = Code("k", (1,), {}, 8, 128, 0, 98304, "", True, 6, loops, {}, {})
    assert code.in_flight is bool(in_flight)
    assert code.blocks == 2
    assert [width(name) for name in ("STG.E.128", "STG.E.U16", "STG.E", "LDGSTS.E.BYPASS.128")] == [16, 2, 4, 16]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_model_counts_steps_waves_and_what_is_drained(monkeypatch):
    """A convolution whose products alone count, by hand: 36 steps of 512 cycles, in as many waves as there are."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    from bench import gpu_model
    from bench.gpu_code import Code, Loop
    from bench.gpu_launches import Convolution

    monkeypatch.setattr(gpu_model, "START", 0)
    conv = Convolution(256, 256, 3, 32, 32, padding=1)
    size = {"ROWS": 1, "PLACES": 128, "BLOCK_N": 128, "BLOCK_K": 64}

    def products(blocks, splits=1, waits=(1,)):
        loop = Loop(0, {}, ((128, 16),) * 4, waits, ())
        code = Code("conv2d_kernel", (blocks, splits), size, 8, 128, 0, 98304, "", True, 0, (loop,), {}, {})
        return gpu_model.time_of_kernel(conv, code, gpu_model.work_of_convolution(conv, 1)).products

    cycle = 1 / gpu_model.CLOCK
    assert products(132) == pytest.approx(36 * 512 * cycle)
    assert products(133) == pytest.approx(2 * 36 * 512 * cycle)  # one multiprocessor has two, and is waited for
    assert products(44, splits=3) == pytest.approx(12 * 512 * cycle)
    assert products(132, waits=(0,)) == pytest.approx(36 * (512 + gpu_model.DRAIN) * cycle)
    assert gpu_model.work_of_convolution(conv, 1).operations == 2 * 5 * 32 * 32 * 256 * 256 * 9
