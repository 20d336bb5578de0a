"""How a convolution is cut into tasks: enough of them for the threads, each with its input in the nearer caches."""

from __future__ import annotations

import dataclasses

from fastens.program.steps import LANES, PATCH_BYTES, TASKS_PER_THREAD


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of a convolution: images and channels, and how many members share the rows.

    Attributes:
        rows: R, of images of ``height`` and ``width`` that it writes.
        members: K, of the weights.
        rows_of_run: rows that follow each other and are one member's.
        given: whether it is only said when the plan runs whose rows they are.
    """

    rows: int
    height: int
    width: int
    channels: int
    out_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    members: int
    rows_of_run: int
    given: bool = False

    @property
    def share(self) -> tuple[int, int]:
        """Members that have rows, and rows of each: on average, where it is only said when the plan runs."""
        runs = self.rows // self.rows_of_run
        members = min(runs, self.members) if self.given else runs
        return members, -(-self.rows // members)


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Rows, output lines and blocks of channels of one task; vectors of one block."""

    row_chunk: int
    band: int
    block_chunk: int
    vectors: int
    tasks: int


def tile(shape: Shape, num_threads: int, squares: int = 0) -> Tiling:
    """Choose the tasks of a convolution.

    First as much input as fits the cache; then, where that leaves the threads without work, fewer rows and fewer
    channels a task. Splitting the channels reads the input once more for each split, which costs little beside the
    products.
    """
    members, own = shape.share
    total = -(-shape.out_channels // LANES)
    vectors = 3 if total == 3 else 1 if total == 1 else 4 if squares == 2 and total % 4 == 0 else 2
    blocks = -(-total // vectors)
    kernel_h, kernel_w = shape.kernel
    line_bytes = ((shape.width - 1) * shape.stride[1] + kernel_w) * shape.channels * 4

    def patch(lines: int) -> int:
        return ((lines - 1) * shape.stride[0] + kernel_h) * line_bytes

    whole = squares or 1  # lines that are not cut

    def halved(lines: int) -> int:
        return -(-lines // (2 * whole)) * whole

    band = shape.height
    while band > whole and patch(band) > PATCH_BYTES:
        band = halved(band)
    row_chunk = max(1, min(own, PATCH_BYTES // patch(band))) if band == shape.height else 1
    wanted = TASKS_PER_THREAD * num_threads if num_threads > 1 else 1

    def parts(lines: int, chunk: int) -> int:
        return -(-shape.height // lines) * -(-blocks // chunk)

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
    if shape.given:  # each member's rows may leave a rest; what is cut beyond the last row is empty
        chunks = (shape.rows + members * (row_chunk - 1)) // row_chunk
    return Tiling(row_chunk, band, block_chunk, vectors, chunks * parts(band, block_chunk))
