"""A step's time on an H200 by a model of compiled code, without a GPU: ``python -m bench.gpu_model NETWORK BATCH``.

Each launch has a floor (operations, bytes, the time between kernels), and for each way of a convolution, whose kernels
are compiled and read, the time of its products (tensor cores), of its instructions (schedulers, special functions), and
of its loads (the second-level cache), with the pass before it; the largest counts, and of the ways the fastest. Blocks
are counted in whole waves. Between two kernels is what an empty one takes but for its own start and end, and nothing
where the second waits beside the first's end. What is left out (latency within a step, clocks below the highest) is of
the same order everywhere: ± 25 % is expected, and ``--measured DIR`` prints the ratio to what ``bench.gpu_roofline``
measured.
"""

import argparse
import dataclasses
import json
import math
from pathlib import Path

import torch

from bench.gpu_launches import K, Work, convolutions, rest
from bench.gpu_ways import codes
from bench.gpu_work import BETWEEN, H200, ITEM

CLOCK = 1.755e9  # cycles per second
MULTIPROCESSORS = 132
PRODUCTS = 2048  # multiplications with addition per cycle of a multiprocessor, in 16 bits
SCHEDULERS = 4  # instructions of a warp per cycle
SPECIAL = 16  # results of special functions per cycle
CACHE = 7e12  # bytes per second that all multiprocessors load from the second-level cache, as tiles at 600 TFLOP/s do
LOADS = 64  # bytes per cycle that one of them loads from it
DRAIN = 600  # cycles from one step to the next where the loop waits for all its products
JOIN = 1000  # cycles in which tiles of one image that run together hand each other their moments, and wait for all
TOGETHER = 8  # blocks that do, at most, as every GPU of compute capability 9.0 can place them
START = 1500  # cycles of a block before its first product, and behind its last until memory has its result


def gap(overlaps):
    """Seconds between the kernel before and this one's first block."""
    return 0.0 if overlaps else BETWEEN - START / CLOCK


@dataclasses.dataclass(frozen=True)
class Time:
    """Seconds of a launch at least, what its products, instructions and loads take, and the gap before it."""

    floor: float
    products: float = 0.0
    instructions: float = 0.0
    loads: float = 0.0
    gap: float = 0.0

    @property
    def seconds(self):
        return max(self.floor, self.products, self.instructions, self.loads) + self.gap

    @property
    def bound(self):
        return max(("floor", "products", "instructions", "loads"), key=lambda name: getattr(self, name))


def work_of_convolution(conv, batch):
    """Operations, and elements that it must read or write once."""
    weights = K * conv.outputs * (conv.channels + conv.skip) * conv.taps**2
    images = (conv.channels + conv.skip) * conv.height**2 * (1 if conv.shared else K)
    images += K * conv.outputs * conv.out_height**2 * (1 + conv.residual) / (K if conv.summed else 1)
    return Work(conv.operations(batch), weights, images * batch)


def steps_of(conv, size):
    """How often the loop of a tile of this size is gone through, and the bytes that it then loads."""
    blocks = sum(-(-channels // size["BLOCK_K"]) for channels in (conv.channels, conv.skip) if channels)
    if "HALOS" in size:  # lines with one more above and below, of three taps
        places, taps, each = (size["TILE_H"] + 2) * size["TILE_W"], 3, 3
    else:
        places = size["ROWS"] * (size["PLACES"] if "PLACES" in size else size["TILE_H"] * size["TILE_W"])
        taps, each = conv.taps**2, 1
    return (K if conv.summed else 1) * taps * blocks, (places + each * size["BLOCK_N"]) * size["BLOCK_K"] * ITEM


def time_of_kernel(conv, code, work):
    """The :class:`Time` of a convolution's kernel: its blocks, each of so many steps of the loop."""
    loop, size = max(code.loops, key=lambda loop: loop.instructions), code.constants
    splits = code.grid[1] if len(code.grid) > 1 else 1
    steps, moved = steps_of(conv, size)
    products = code.warps // 4 * sum(64 * columns * depth for columns, depth in loop.products) / PRODUCTS
    issued = max(code.warps * loop.instructions / SCHEDULERS, code.warps * 32 * loop.count("MUFU") / SPECIAL)
    drained = DRAIN if loop.waits and min(loop.waits) == 0 else 0
    blocks, waves = math.prod(code.grid), waves_of(code)
    ending = START + (code.instructions - loop.instructions) * code.warps / SCHEDULERS
    ending /= min(code.blocks, max(1, waves))  # it is beside the products of other blocks

    def seconds(cycles):
        return waves * (-(-steps // splits) * cycles + ending) / CLOCK

    loads = max(seconds(moved / LOADS), blocks * -(-steps // splits) * moved / CACHE)
    floor = work.floor(H200, START / CLOCK)
    return Time(floor, seconds(products + drained), seconds(issued + drained), loads, gap(code.overlaps))


def time_of_pass(conv, code, batch):
    """Seconds of the pass before a convolution: the image is read and written once."""
    elements = 2 * K * batch * (conv.channels + conv.skip) * conv.height**2
    return Work(0, 0, elements).floor(H200, START / CLOCK) + gap(code.overlaps)


def waves_of(code):
    """How many blocks a multiprocessor has in turn: whole ones, where they are few."""
    blocks = math.prod(code.grid)
    whole = blocks < 4 * code.blocks * MULTIPROCESSORS
    return math.ceil(blocks / MULTIPROCESSORS) if whole else blocks / MULTIPROCESSORS


def in_producer(conv, batch, code, seconds):
    """Of the seconds of a pass, those that are left where the kernel that made the image writes it normalised.

    Where its groups are of two images, or its tiles too many to wait for each other, they are not known there. What
    begins a block is read as it is too, by the residual, so that one image more is written. Its tiles are taken to be
    those of this convolution: at the end of each, its blocks wait for each other, and then activate their sums, two
    results of special functions each, which no products are beside but those of other blocks.
    """
    size = code.constants
    places = size["PLACES"] if "PLACES" in size else size["TILE_H"] * size["TILE_W"]
    if conv.skip or not conv.moments or conv.height**2 > TOGETHER * places:
        return seconds
    waves, sums = waves_of(code), size.get("ROWS", 1) * places * size["BLOCK_N"]
    cycles = 2 * sums / SPECIAL if conv.activation != "none" else 0.0
    cycles += JOIN if conv.height**2 > places else 0
    more = 0 if conv.residual else Work(0, 0, K * batch * conv.channels * conv.height**2).bytes
    beside = min(code.blocks, max(1, waves))
    return min(waves * cycles / CLOCK / beside + more / H200["bytes per second"], seconds)


def times_of(conv, batch, without=()):
    """What each way of a convolution takes: name -> (seconds, its convolution's time, the pass's, in its producer)."""
    work, found = work_of_convolution(conv, batch), {}
    for way, kernels in codes(conv, batch, torch.bfloat16).items():
        before, main, own = 0.0, None, None
        for code in kernels:
            if code.kernel.startswith("conv2d"):
                main, own = time_of_kernel(conv, code, work), code
            else:
                before += time_of_pass(conv, code, batch)
        if way not in without:
            found[way] = (before + main.seconds, main, before, in_producer(conv, batch, own, before))
    return found


def model(name, batch, without=()):
    """Rows of a network's step: number, launch, way, milliseconds of all of the kind, and what bounds them.

    ``ms in producer`` is what it would take with norm and activation in the epilogue of what is before it.
    """
    rows = []
    for conv, number in convolutions(name).items():
        times = times_of(conv, batch, without)
        way = min(times, key=lambda way: times[way][0])
        seconds, main, before, _ = times[way]
        fused = min(main.seconds + left for _, main, _, left in times.values())
        rows.append({
            "number": number, "launch": str(conv), "way": way, "bound": main.bound, "ms": 1e3 * number * seconds,
            "ms in producer": 1e3 * number * fused, "passes": 1e3 * number * before,
            "floor": 1e3 * number * main.floor, "operations": number * conv.operations(batch),
            **{kind: 1e3 * number * getattr(main, kind) for kind in ("products", "instructions", "loads")},
        })  # fmt: skip
    for number, kind, work in rest(name):
        least = 1e3 * number * work.at(batch).floor(H200, START / CLOCK)
        between = 1e3 * number * gap(overlaps=not kind.startswith("aten."))  # torch's wait for the end
        rows.append({
            "number": number, "launch": kind, "way": "", "bound": "floor", "ms": least + between, "floor": least,
            "ms in producer": least + between, "passes": 0.0, "products": 0.0,
            "instructions": 0.0, "loads": 0.0, "operations": number * work.at(batch).operations,
        })  # fmt: skip
    return rows


def table(name, batch, rows):
    """The rows as Markdown, those that lose most to their floor apart."""
    columns = ("ms", "floor", "products", "instructions", "loads")
    lines = [f"## {name}, K={K}, B={batch}", "", f"| number | launch | way | bound by | {' | '.join(columns)} |"]
    lines += ["|---|---|---|---|" + "---|" * len(columns)]
    for row in sorted(rows, key=lambda row: row["floor"] - row["ms"]):
        cells = " | ".join(f"{row[column]:.3f}" for column in columns)
        lines.append(f"| {row['number']} | {row['launch']} | {row['way']} | {row['bound']} | {cells} |")
    sums = {
        column: sum(row[column] for row in rows) for column in ("ms", "floor", "operations", "passes", "ms in producer")
    }
    rate = sums["operations"] / sums["ms"] / 1e9
    number = sum(row["number"] for row in rows)
    lines.append(f"| {number} | **all** | | | {sums['ms']:.3f} | {sums['floor']:.3f} | | {rate:.0f} TFLOP/s | |")
    lines += [
        "",
        f"passes before convolutions: {sums['passes']:.3f} ms; all with norm and activation in the epilogue of what "
        f"is before: {sums['ms in producer']:.3f} ms, {sums['ms'] / sums['ms in producer']:.3f} times as fast",
    ]
    return "\n".join(lines) + "\n"


def against(folder, name, rows):
    """What was measured of these launches, as a ratio to the model."""
    measured = [row for row in json.loads((folder / "roofline.json").read_text())["launches"] if row["network"] == name]
    took = 1e3 * sum(row["number"] * row["seconds"] for row in measured)
    return f"measured {took:.3f} ms, {took / sum(row['ms'] for row in rows):.2f} of the model\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("network")
    parser.add_argument("batch", type=int)
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--measured", type=Path, help="folder with roofline.json")
    parser.add_argument("--without", nargs="+", default=(), help="ways that are left out")
    options = parser.parse_args()
    rows = model(options.network, options.batch, options.without)
    text = table(options.network, options.batch, rows)
    if options.measured:
        text += "\n" + against(options.measured, options.network, rows)
    options.file.write_text(text) if options.file else print(text)


if __name__ == "__main__":
    main()
