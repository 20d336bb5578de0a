"""Convolution steps in Winograd's squares: the kernels against the reference and against torch."""

import pytest
import torch

from fastens import _native
from fastens.ops.run_program import available
from fastens.program.steps import Activation
from fastens.program.winograd import TILES, recovered, transformed
from tests.ops.programs import random
from tests.ops.test_run_program_conv import CHANNELS, check
from tests.tolerances import OP, relative_error

pytestmark = [
    pytest.mark.skipif(not available(), reason=f"no compiled library: {_native.status()}"),
    pytest.mark.parametrize("squares", TILES),
]


@pytest.mark.parametrize("in_channels", CHANNELS)
@pytest.mark.parametrize("out_channels", CHANNELS)
def test_channels(squares, in_channels, out_channels):
    for vectors in (1, 2, 3, 4):
        shape = {"in_channels": (in_channels,), "out_channels": out_channels, "size": (3, 5), "rows_per_member": 1}
        check(squares=squares, vectors=vectors, **shape)


@pytest.mark.covering(2)
@pytest.mark.parametrize("height", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("width", [1, 2, 5, 6, 8, 17, 33])
@pytest.mark.parametrize("padding", [(1, 1, 1, 1), (2, 2, 2, 2), (0, 3, 2, 1)])
def test_sizes_that_are_no_multiple_of_a_square(squares, height, width, padding):
    check(squares=squares, size=(height, width), padding=padding, residual=True)


def test_without_padding(squares):
    check(squares=squares, size=(9, 7), padding=(0, 0, 0, 0))


@pytest.mark.covering(2)
@pytest.mark.parametrize("row_chunk", [1, 2, 3])
@pytest.mark.parametrize("band", [1, 2, 4, 6, 7])
@pytest.mark.parametrize("block_chunk", [1, 2, 5])
@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_cuts(squares, row_chunk, band, block_chunk, num_threads):
    cut = {"row_chunk": row_chunk, "band": band, "block_chunk": block_chunk, "num_threads": num_threads}
    check(squares=squares, out_channels=70, **cut)


@pytest.mark.parametrize("vectors", [2, 4])
def test_more_squares_than_the_cache_holds(squares, vectors):
    shape = {"in_channels": (256,), "out_channels": 70, "size": (42, 35)}
    check(squares=squares, vectors=vectors, members=1, rows_per_member=2, row_chunk=2, residual=True, **shape)


@pytest.mark.parametrize(("members", "rows_per_member"), [(1, 1), (1, 4), (2, 3), (5, 2), (17, 3)])
def test_members_and_rows(squares, members, rows_per_member):
    check(squares=squares, members=members, rows_per_member=rows_per_member, row_chunk=2, num_threads=2)


@pytest.mark.parametrize("given", [(2,), (0, 0, 1, 2, 2), (2, 0, 1, 1, 0, 2)])
@pytest.mark.parametrize("row_chunk", [1, 5, 100])
def test_rows_of_given_members(squares, given, row_chunk):
    rows = {"members": 3, "given": given, "row_chunk": row_chunk, "row_vector": True}
    check(squares=squares, out_channels=70, block_chunk=1, num_threads=2, **rows)


@pytest.mark.parametrize("in_channels", [(17, 20), (3, 130), (32, 32), (20,)])
@pytest.mark.parametrize("up", [1, 2, 3])
@pytest.mark.parametrize("tables", [False, True])
def test_joined_and_enlarged_sources(squares, in_channels, up, tables):
    check(squares=squares, in_channels=in_channels, up=up, tables=tables, band=4)


@pytest.mark.parametrize("copies", [1, 3])
def test_rows_that_share_a_source(squares, copies):
    check(squares=squares, copies=copies)


@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("tables", [False, True])
def test_prologues_and_activations(squares, activation, tables):
    check(squares=squares, act_in=activation, tables=tables)
    check(squares=squares, act_out=activation, tables=tables)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("row_vector", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("scale", [1.0, -0.7])
def test_epilogues(squares, bias, row_vector, residual, scale):
    what = {"bias": bias, "row_vector": row_vector, "residual": residual, "scale": scale}
    check(squares=squares, out_channels=37, act_out=Activation.SILU, num_threads=2, **what)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_row_stays_alone(squares, value):
    clean, bad = check(squares=squares), check(squares=squares, poison=(1, value))
    others = [0, 2, 3, 4, 5]
    assert torch.equal(bad[others], clean[others])
    assert not bad[1].isfinite().any()


def test_transformed_kernels_are_recovered(squares):
    kernels = random(3, 5, 3, 3).double()
    assert relative_error(recovered(transformed(kernels, squares), squares), kernels) < OP[torch.float64]
