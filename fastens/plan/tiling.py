"""How a convolution is cut into tasks: enough of them for the threads, each with its input in the nearer caches."""

from __future__ import annotations

import dataclasses

from fastens.plan.values import Convolved
from fastens.program.steps import LANES, PATCH_BYTES, TASKS_PER_THREAD


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Rows, output lines and blocks of channels of one task; vectors of one block."""

    row_chunk: int
    band: int
    block_chunk: int
    vectors: int
    tasks: int


def tile(value: Convolved, in_channels: int, num_threads: int, squares: int = 0) -> Tiling:
    """Choose the tasks of a convolution.

    First as much input as fits the cache; then, where that leaves the threads without work, fewer rows and fewer
    channels a task. Splitting the channels reads the input once more for each split, which costs little beside the
    products.
    """
    pixels = value.pixels
    members, own = value.share
    total = -(-value.weight.shape[1] // LANES)
    vectors = 3 if total == 3 else 1 if total == 1 else 4 if squares == 2 and total % 4 == 0 else 2
    blocks = -(-total // vectors)
    kernel_h, kernel_w = value.weight.shape[3:]
    line_bytes = ((pixels.width - 1) * value.stride[1] + kernel_w) * in_channels * 4

    def patch(lines: int) -> int:
        return ((lines - 1) * value.stride[0] + kernel_h) * line_bytes

    whole = squares or 1  # lines that are not cut

    def halved(lines: int) -> int:
        return -(-lines // (2 * whole)) * whole

    band = pixels.height
    while band > whole and patch(band) > PATCH_BYTES:
        band = halved(band)
    row_chunk = max(1, min(own, PATCH_BYTES // patch(band))) if band == pixels.height else 1
    wanted = TASKS_PER_THREAD * num_threads if num_threads > 1 else 1

    def parts(lines: int, chunk: int) -> int:
        return -(-pixels.height // lines) * -(-blocks // chunk)

    def tasks(rows: int, lines: int, chunk: int) -> int:
        return members * -(-own // rows) * parts(lines, chunk)

    block_chunk = blocks
    while row_chunk > 1 and tasks(row_chunk, band, block_chunk) < wanted:
        row_chunk = -(-row_chunk // 2)
    while block_chunk > 1 and tasks(row_chunk, band, block_chunk) < wanted:
        block_chunk = -(-block_chunk // 2)
    while band > 4 and tasks(row_chunk, band, block_chunk) < wanted:
        band = halved(band)
    chunks = members * -(-own // row_chunk)
    if value.runs.members is not None:  # each member's rows may leave a rest; what is cut beyond the last row is empty
        chunks = (pixels.rows + members * (row_chunk - 1)) // row_chunk
    return Tiling(row_chunk, band, block_chunk, vectors, chunks * parts(band, block_chunk))
