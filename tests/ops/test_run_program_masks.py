"""Dropout in programs: the words drawn, and masks on the way into and out of convolutions and by themselves."""

import pytest
import torch
import torch.nn.functional as F

from fastens import _native
from fastens.ops.dropout import dropout
from fastens.ops.run_program import available, run_program
from fastens.program import steps
from fastens.program.steps import Activation, Image
from fastens.reference import run_program as reference
from tests.ops.programs import GAP, Memory, assert_close, random
from tests.ops.test_run_program_conv import check

pytestmark = pytest.mark.skipif(not available(), reason=f"no compiled library: {_native.status()}")
LAYOUTS = {  # how a row [C, pixels] or [pixels, C] counts its elements: (pixel_step, channel_step)
    "channels first": lambda pixels, channels: (1, pixels),
    "tokens": lambda pixels, channels: (channels, 1),
}


def bits_of(words, channels):
    """Whether each channel is kept, from the words [..., ceil(C / 16)] of a mask."""
    return (words.int()[..., None] >> torch.arange(steps.LANES) & 1).flatten(-2)[..., :channels].bool()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("pixels", "channels"), [(64, 32), (49, 20), (1, 37), (16, 130), (6, 17), (9, 64)])
@pytest.mark.parametrize("p", [0.1, 0.75, 1.0])
def test_drawn_words_are_those_of_the_op(layout, pixels, channels, p):
    rows, key, evaluation = 6, -(2**62) + 12345, 2**33 + 7
    members, samples = torch.tensor([2, 0, 0, 1, 2, 2**31]), torch.tensor([0, 1, 2**31, 5, 0, 3])
    pixel_step, channel_step = LAYOUTS[layout](pixels, channels)
    words = -(-channels // steps.LANES)
    splits = min(3, -(-pixels // 4))
    out_row = pixels * (words + 1) + 5  # words between pixels and rows stay as they are
    out_row += out_row % 2
    step = steps.Draw(
        rows,
        1,
        splits,
        pixels,
        channels,
        pixel_step,
        channel_step,
        steps.address(2, 8),
        steps.address(2, 0),
        steps.address(3, 0),
        round(p * 2**32),
        steps.address(0, 4 * GAP),
        out_row,
        words + 1,
        steps.address(4, 0),
        tasks=rows * splits,
    )
    arenas = [torch.full((2 * GAP + rows * out_row // 2,), torch.nan) for _ in range(2)]
    inputs = [torch.tensor([evaluation, key]), samples, members]
    for run, arena in zip((run_program, reference.run_program), arenas, strict=True):
        run(steps.encode([step]), torch.empty(0), arena, inputs, [], 2)
    ours, theirs = (arena.view(torch.int16) for arena in arenas)
    assert torch.equal(ours, theirs)
    drawn = ours[2 * GAP :].as_strided((rows, pixels, words), (out_row, words + 1, 1), 2 * GAP)
    kept = dropout(torch.ones(rows, pixels * channels), members, samples, p, key, evaluation) > 0
    expected = kept.as_strided((rows, pixels, channels), (pixels * channels, pixel_step, channel_step))
    assert torch.equal(bits_of(drawn, channels), expected)


@pytest.mark.parametrize("masks", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("channels", [(17,), (32,), (16, 21)])
def test_masks_of_convolutions(masks, channels):
    common = {"in_channels": channels, "masks": masks, "tables": True, "act_in": Activation.SILU}
    check(**common, residual=True, row_vector=True, scale=0.7, act_out=Activation.SILU, num_threads=2)
    check(**common, out_channels=70, up=2, band=4, block_chunk=1)
    check(**common, kernel=(1, 1), padding=(0, 0, 0, 0))
    check(**common, given=(1, 0, 0, 1))


def test_a_linear_layer_under_a_mask_alone():
    """Nothing else is done to its input, so that only the mask keeps it from being read where it is."""
    check(kernel=(1, 1), padding=(0, 0, 0, 0), masks=(True, False))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_mask_does_not_hide_a_bad_row(bad):
    clean = check(masks=(True, False))
    poisoned = check(masks=(True, False), poison=(1, bad))
    others = torch.arange(len(clean)) != 1
    assert poisoned[1].isnan().all()
    assert torch.equal(poisoned[others], clean[others])


@pytest.mark.parametrize("activation", [Activation.NONE, Activation.SILU])
@pytest.mark.parametrize("channels", [(3,), (37,), (16, 20)])
def test_a_mask_by_itself(channels, activation):
    rows, height, width = 4, 5, 3
    memory, total = Memory(), sum(channels)
    images = [random(rows, c, height, width, seed=i) for i, c in enumerate(channels)]
    sources = ([memory.image(x) for x in images] + [Image()])[:2]
    scale, shift = random(rows, total, seed=1), random(rows, total, seed=2)
    mask, kept = memory.mask(2, total, height, width, 1.5, rows // 2)
    out, view = memory.image_room(rows, total, height, width)
    tables = (memory.put(scale), memory.put(shift))
    step = steps.Drop(rows, 2, (sources[0], sources[1]), height, width, *tables, int(activation), mask, out, tasks=8)
    (actual,) = memory.check(step, view, num_threads=2)
    x = torch.cat(images, 1).double() * scale[:, :, None, None] + shift[:, :, None, None]
    assert_close(actual, (F.silu(x) if activation else x) * kept)
