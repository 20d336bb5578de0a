"""The pieces of a convolution kernel: what happens to the input as it is loaded, the products, and what follows them.

A tile is ROWS rows (images) times PLACES places of the output, by BLOCK_N of its channels. Its sums run over steps: the
kernel's taps innermost, so that they find the input of one block of channels in the cache, then blocks of channels.
"""
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false, reportReturnType=false
# Triton compiles these functions: pyright takes them for Python.

from __future__ import annotations

import triton
import triton.language as tl

from fastens.kernels._activation import activated
from fastens.kernels._launch import kernel, wait_for_previous


@triton.jit
def place_of_tile(
    first_row, rows_per_member, row_tiles, place_tiles, output_tiles, out_height, out_width,
    ROWS: tl.constexpr, PLACES: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What a program's tile covers: member, rows, and for each row of the product its row, place and whether it is."""
    pid = tl.program_id(0)
    first_column = pid % output_tiles * BLOCK_N
    place_tile = pid // output_tiles % place_tiles
    row_tile = pid // output_tiles // place_tiles % row_tiles
    member = (pid // output_tiles // place_tiles // row_tiles).to(tl.int64)
    begin = member * rows_per_member
    end = begin + rows_per_member
    if first_row is not None:
        begin = tl.load(first_row + member)
        end = tl.load(first_row + member + 1)
    first = begin + row_tile * ROWS
    row = first + tl.arange(0, ROWS)
    each = tl.arange(0, ROWS * PLACES)
    at_row = first + each // PLACES
    place = place_tile * PLACES + each % PLACES
    valid = (at_row < end) & (place < out_height * out_width)
    return member, begin, first, end, row, row < end, at_row, place, valid, first_column, place_tile


@triton.jit
def over_places(values, ROWS: tl.constexpr, PLACES: tl.constexpr, WIDTH: tl.constexpr):
    """A row's values for each of its places: [ROWS, WIDTH] -> [ROWS * PLACES, WIDTH], or [1, WIDTH] as it is."""
    if ROWS > 1:
        values = tl.reshape(tl.broadcast_to(values[:, None, :], [ROWS, PLACES, WIDTH]), [ROWS * PLACES, WIDTH])
    return values


@triton.jit
def norm_of_moments(
    row, row_exists, channel, channel_exists, member, moments, skip_moments, weight, bias, scale, shift, channels,
    skip_channels, per_group, per_norm, space, span,
    eps: tl.constexpr, SPANS: tl.constexpr, PARTS: tl.constexpr, PADDED_PARTS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Mean, factor and offset [rows, channels]: norm and maps together are (x - mean) * factor + offset.

    A group of the norm has PARTS moments, of each of its SPANS of each of its parts' groups of per_group channels.
    """
    mask = row_exists[:, None] & channel_exists[None, :]
    each = tl.arange(0, PADDED_PARTS)
    group = channel // per_norm
    at_span = each
    if PARTS > SPANS:
        at_span = each % SPANS
    held = tl.where(each < PARTS, tl.minimum(span, space - at_span * span) * per_group, 0).to(WIDE)[None, None, :]
    total = tl.sum(held, 2)
    found = mask[:, :, None] & (each < PARTS)[None, None, :]
    if skip_moments is None:
        at = moments + ((row[:, None] * (channels // per_norm) + group[None, :])[:, :, None] * PARTS + each) * 2
        means = tl.load(at, found, other=0.0)
        scatters = tl.load(at + 1, found, other=0.0)
    else:
        part = (group[:, None] * PARTS + each[None, :])[None, :, :]
        parts = (channels - skip_channels) // per_group * SPANS
        skip_parts = skip_channels // per_group * SPANS
        here = found & (part < parts)
        there = found & (part >= parts)
        at = moments + (row[:, None, None] * parts + part) * 2
        at_skip = skip_moments + (row[:, None, None] * skip_parts + (part - parts)) * 2
        means = tl.load(at, here, other=0.0) + tl.load(at_skip, there, other=0.0)
        scatters = tl.load(at + 1, here, other=0.0) + tl.load(at_skip + 1, there, other=0.0)
    mean = tl.sum(means * held, 2) / total
    apart = tl.where(found, means - mean[:, :, None], 0.0)
    scatter = tl.sum(scatters + held * apart * apart, 2)
    factor = 1.0 / tl.sqrt(scatter / total + eps)
    offset = tl.zeros_like(factor)
    own = member * channels + channel
    if weight is not None:
        factor *= tl.load(weight + own, channel_exists, other=0.0).to(WIDE)[None, :]
    if bias is not None:
        offset += tl.load(bias + own, channel_exists, other=0.0).to(WIDE)[None, :]
    own = row[:, None] * channels + channel[None, :]
    if scale is not None:
        more = 1.0 + tl.load(scale + own, mask, other=0.0).to(WIDE)
        factor, offset = factor * more, offset * more
    if shift is not None:
        offset += tl.load(shift + own, mask, other=0.0).to(WIDE)
    return mean, factor, offset


@triton.jit
def write_maps(
    maps, row, row_exists, member, begin, end, moments, skip_moments, weight, bias, scale, shift, channels,
    skip_channels, per_group, per_norm, space, span,
    eps: tl.constexpr, SPANS: tl.constexpr, PARTS: tl.constexpr, PADDED_PARTS: tl.constexpr, BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """maps[r, :, c] = mean, factor and offset of the norm before the convolution, for rows of one member.

    Channels from begin to end are written, and some behind them.
    """
    for start in range(begin, end, BLOCK):
        channel = start + tl.arange(0, BLOCK)
        mean, factor, offset = norm_of_moments(
            row, row_exists, channel, channel < channels, member, moments, skip_moments, weight, bias, scale, shift,
            channels, skip_channels, per_group, per_norm, space, span, eps, SPANS, PARTS, PADDED_PARTS, WIDE,
        )  # fmt: skip
        known = row_exists[:, None] & (channel < channels)[None, :]
        at = maps + row[:, None] * 3 * channels + channel[None, :]
        tl.store(at, mean, known)
        tl.store(at + channels, factor, known)
        tl.store(at + 2 * channels, offset, known)


@triton.jit
def channels_of_steps(begin, end, channels, skip_channels, TAPS: tl.constexpr, BLOCK_K: tl.constexpr):
    """The first channel that steps begin to end take, of x and skip as one image, and the first behind."""
    x_channels = channels - skip_channels
    padded = tl.cdiv(x_channels, BLOCK_K) * BLOCK_K
    begin, end = begin // TAPS * BLOCK_K, tl.cdiv(end, TAPS) * BLOCK_K
    begin = tl.where(begin < padded, begin, begin - padded + x_channels)
    end = tl.where(end < padded, end, end - padded + x_channels)
    return begin, tl.minimum(end, channels)


@kernel
def maps_kernel(
    maps, moments, skip_moments, weight, bias, scale, shift, member_of_row, rows, rows_per_member, channels,
    skip_channels, per_group, per_norm, space, span,
    eps: tl.constexpr, SPANS: tl.constexpr, PARTS: tl.constexpr, PADDED_PARTS: tl.constexpr, BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """The maps of one row, where moments are too many for every tile to join."""
    wait_for_previous()
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    member = tl.program_id(0).to(tl.int64) // rows_per_member
    if member_of_row is not None:
        member = tl.load(member_of_row + tl.program_id(0)).to(tl.int64)
    write_maps(
        maps, row, row < rows, member, 0, channels, moments, skip_moments, weight, bias, scale, shift, channels,
        skip_channels, per_group, per_norm, space, span, eps, SPANS, PARTS, PADDED_PARTS, BLOCK, WIDE,
    )  # fmt: skip


@triton.jit
def activated_on_load(y, ACTIVATION: tl.constexpr):
    """As :func:`activated`, in fewer instructions, since each element is of several taps and tiles.

    Powers of two are flushed to zero below float32's full precision, where they vanish beside the 1 in the sum.
    """
    if ACTIVATION == "silu" and y.dtype == tl.float32:
        return y / (1.0 + tl.exp2(y * -1.4426950408889634))
    return activated(y, ACTIVATION)


@triton.jit
def kept(mask, place, inside, channel, first_word, words, WORDS: tl.constexpr):
    """Whether the mask keeps each of the channels at each place, 0 or 1: they are of WORDS words from the first on."""
    position = channel - first_word * 32
    bits = tl.zeros([1, 1], tl.int32)
    for i in tl.static_range(WORDS):
        own = tl.load(mask + place * words + first_word + i, inside & (first_word + i < words), other=0)
        bits = tl.where((position // 32 == i)[None, :], own[:, None], bits)
    return (bits >> (position % 32)[None, :]) & 1


@triton.jit
def products(
    acc, x, skip, weight, maps, mask, mask_row, x_first, first, row_exists, place, valid, place_tile, first_column,
    begin, end, channels, skip_channels, outputs, height, width, out_width, down, right, above, before, weight_o,
    weight_c, weight_h, weight_w,
    mask_scale: tl.constexpr, MASK_WORDS: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr, WIDENED: tl.constexpr, TAPS_H: tl.constexpr, TAPS_W: tl.constexpr, ROWS: tl.constexpr,
    PLACES: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Add steps begin to end of one member's sum to acc [ROWS * PLACES, BLOCK_N]; there is one at least.

    weight is that member's; x_first is the tile's first row of x, first that of maps; mask_row [ROWS * PLACES] is
    where kept bits are found. The channels of skip follow those of x. A step takes its block of channels from one of
    both: x's last block is padded, so that no block is of both. Addresses are 64-bit numbers of the step, to which a
    tile's own offsets are added, of as many bits as these need.
    """
    # The only loop, and never empty: the products of a loop that may be, or of one after another, are not in flight.
    tl.assume(begin < end)
    each = tl.arange(0, ROWS * PLACES)
    corner = place_tile * PLACES
    corner_h, corner_w = corner // out_width * down - above, corner % out_width * right - before
    top, left = place // out_width * down - above, place % out_width * right - before
    from_corner = ((each // PLACES * height + top - corner_h) * width + left - corner_w).to(OFFSET)
    top = tl.where(valid, top, -(1 << 30))  # outside of the image, whatever the tap
    x_place = (x_first * height + corner_h) * width + corner_w
    source, own_channels, channels_before = x, channels, 0
    x_blocks = tl.cdiv(channels - skip_channels, BLOCK_K)
    of_block = tl.arange(0, BLOCK_K)
    of_tile = tl.arange(0, acc.shape[1])
    column = first_column + of_tile
    column_offset = of_tile.to(OFFSET)[None, :] * weight_o
    weight_offset = (of_block.to(OFFSET)[:, None] * weight_c + column_offset).to(OFFSET)
    weight_corner = weight + tl.cast(first_column, tl.int64) * weight_o
    if maps is not None:
        maps_corner = maps + first * 3 * channels
        maps_offset = tl.arange(0, ROWS)[:, None] * (3 * channels) + of_block[None, :]
    for step in range(begin, end):
        tap = step % (TAPS_H * TAPS_W)  # pyright: ignore[reportOperatorIssue]  # a constexpr is a number here
        tap_h, tap_w = tap // TAPS_W, tap % TAPS_W
        block = step // (TAPS_H * TAPS_W)
        if skip is not None:
            beyond = block >= x_blocks
            source = tl.where(beyond, skip, x)
            own_channels = tl.where(beyond, skip_channels, channels - skip_channels)
            channels_before = tl.where(beyond, channels - skip_channels, 0)
            block = tl.where(beyond, block - x_blocks, block)
        block *= BLOCK_K
        channel = channels_before + block
        at_h, at_w = top + tap_h, left + tap_w
        inside = (at_h.to(tl.uint32) < tl.cast(height, tl.uint32)) & (at_w.to(tl.uint32) < tl.cast(width, tl.uint32))
        exists = block + of_block < own_channels
        if EVEN_K:
            exists = of_block >= 0
            found = tl.broadcast_to(inside[:, None], [ROWS * PLACES, BLOCK_K])
        else:
            found = inside[:, None] & exists[None, :]
        tap_corner = source + (x_place + tap_h * width + tap_w) * own_channels + block
        a = tl.load(tap_corner + (from_corner[:, None] * own_channels + of_block[None, :]), found, other=0.0)
        if maps is not None or mask is not None or ACTIVATION != "none":
            value = a.to(WIDE)
            if maps is not None:
                at = maps_corner + channel + maps_offset
                known = row_exists[:, None] & exists[None, :]
                mean = over_places(tl.load(at, known, other=0.0), ROWS, PLACES, BLOCK_K)
                factor = over_places(tl.load(at + channels, known, other=0.0), ROWS, PLACES, BLOCK_K)
                offset = over_places(tl.load(at + 2 * channels, known, other=0.0), ROWS, PLACES, BLOCK_K)
                value = (value - mean) * factor + offset
            value = activated_on_load(value, ACTIVATION)
            if mask is not None:  # by a product: what is no number stays it
                word = (mask_row * height + at_h) * width + at_w
                bits = kept(mask, word, inside, channel + of_block, channel // 32, tl.cdiv(channels, 32), MASK_WORDS)
                value *= bits.to(WIDE) * mask_scale
            a = tl.where(found, value, 0.0).to(a.dtype)  # padding is zero behind the norm
        at = weight_corner + tl.cast(channel, tl.int64) * weight_c + tap_h * weight_h + tap_w * weight_w
        if EVEN_K and EVEN_N:
            b = tl.load(at + weight_offset)
        elif EVEN_N:
            b = tl.load(at + weight_offset, exists[:, None], other=0.0)
        elif EVEN_K:
            b = tl.load(at + weight_offset, (column < outputs)[None, :], other=0.0)
        else:
            b = tl.load(at + weight_offset, exists[:, None] & (column < outputs)[None, :], other=0.0)
        if WIDENED:
            a, b = a.to(WIDE), b.to(WIDE)
        acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=WIDE)
    return acc


@triton.jit
def joined(
    acc, workspace, arrivals, SPLITS: tl.constexpr, SIZE: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """The sum of a tile's parts [SIZE, BLOCK_N] in their order, where this program is the last of them; whether it is.

    workspace [tiles, SPLITS, SIZE, BLOCK_N]; arrivals int32 [tiles], of zeros before and behind a launch.
    """
    tile = tl.program_id(0)
    first = workspace + tile.to(tl.int64) * (SPLITS * SIZE * BLOCK_N)
    each = tl.arange(0, SIZE)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    tl.store(first + tl.program_id(1) * (SIZE * BLOCK_N) + each, acc)
    tl.debug_barrier()  # the part is written before one thread releases it
    last = tl.atomic_add(arrivals + tile, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
    if last:
        tl.store(arrivals + tile, 0)
        acc = tl.zeros([SIZE, BLOCK_N], WIDE)
        for split in tl.range(SPLITS, loop_unroll_factor=2):
            acc += tl.load(first + split * (SIZE * BLOCK_N) + each, cache_modifier=".cg")  # from where they meet, L2
    return acc, last


@triton.jit
def finish_part(
    acc, y, bias, row_bias, residual, moments, member, row, row_exists, at_row, place, valid, first_column, outputs,
    space, span_index, spans,
    output_scale: tl.constexpr, ACTIVATION: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, PLACES: tl.constexpr,
    BLOCK_N: tl.constexpr, PER_GROUP: tl.constexpr,
):  # fmt: skip
    """Add bias, row bias and residual, scale, activate, store; and the moments of what was stored."""
    column = first_column + tl.arange(0, BLOCK_N)
    known = column < outputs
    mask = valid[:, None] & known[None, :]
    if bias is not None:
        acc += tl.load(bias + member * outputs + column, known, other=0.0).to(WIDE)[None, :]
    if row_bias is not None:
        own = tl.load(
            row_bias + row[:, None] * outputs + column[None, :], row_exists[:, None] & known[None, :], other=0.0
        )
        acc += over_places(own.to(WIDE), ROWS, PLACES, BLOCK_N)
    at = (at_row * space + place)[:, None] * outputs + column[None, :]
    if residual is not None:
        acc += tl.load(residual + at, mask, other=0.0).to(WIDE)
    stored = activated(acc * output_scale, ACTIVATION).to(y.dtype.element_ty)
    tl.store(y + at, stored, mask)
    if moments is not None:
        GROUPS: tl.constexpr = BLOCK_N // PER_GROUP
        value = tl.where(mask, stored.to(WIDE), 0.0)
        held = tl.reshape(tl.sum(tl.reshape(mask.to(WIDE), [ROWS, PLACES, BLOCK_N]), 1), [ROWS, GROUPS, PER_GROUP])
        count = tl.maximum(tl.sum(held, 2), 1.0)
        total = tl.reshape(tl.sum(tl.reshape(value, [ROWS, PLACES, BLOCK_N]), 1), [ROWS, GROUPS, PER_GROUP])
        mean = tl.sum(total, 2) / count
        spread = tl.reshape(tl.broadcast_to(mean[:, :, None], [ROWS, GROUPS, PER_GROUP]), [ROWS, BLOCK_N])
        apart = tl.reshape(value, [ROWS, PLACES, BLOCK_N]) - spread[:, None, :]
        apart = tl.where(tl.reshape(mask, [ROWS, PLACES, BLOCK_N]), apart, 0.0)
        scatter = tl.sum(tl.reshape(tl.sum(apart * apart, 1), [ROWS, GROUPS, PER_GROUP]), 2)
        groups = outputs // PER_GROUP
        group = first_column // PER_GROUP + tl.arange(0, GROUPS)
        to = ((row[:, None] * groups + group[None, :]) * spans + span_index) * 2
        found = row_exists[:, None] & (group < groups)[None, :]
        tl.store(moments + to, mean, found)
        tl.store(moments + to + 1, scatter, found)


PART = 64  # output channels that are finished at a time: the registers hold a part twice, in two orders


def has_whole_groups(block_n: int, per_group: int, part: int = PART) -> bool:
    """Whether each part of block_n output channels is of whole groups of per_group, whose moments it takes itself."""
    return min(block_n, part) % per_group == 0 and not per_group & (per_group - 1)


@triton.jit
def finish(
    acc, y, bias, row_bias, residual, moments, member, row, row_exists, at_row, place, valid, first_column, outputs,
    space, span_index, spans,
    output_scale: tl.constexpr, ACTIVATION: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, PLACES: tl.constexpr,
    BLOCK_N: tl.constexpr, PER_GROUP: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Finish the sums acc [ROWS * PLACES, BLOCK_N], from channel first_column on, PART channels at a time."""
    if BLOCK_N > PART:
        halves = tl.split(tl.permute(tl.reshape(acc, [ROWS * PLACES, 2, BLOCK_N // 2]), [0, 2, 1]))
        for i in tl.static_range(2):
            finish(
                halves[i], y, bias, row_bias, residual, moments, member, row, row_exists, at_row, place, valid,
                first_column + i * (BLOCK_N // 2), outputs, space, span_index, spans, output_scale, ACTIVATION, WIDE,
                ROWS, PLACES, BLOCK_N // 2, PER_GROUP, PART,
            )  # fmt: skip
    else:
        finish_part(
            acc, y, bias, row_bias, residual, moments, member, row, row_exists, at_row, place, valid,
            first_column, outputs, space, span_index, spans, output_scale, ACTIVATION, WIDE,
            ROWS, PLACES, BLOCK_N, PER_GROUP,
        )  # fmt: skip
