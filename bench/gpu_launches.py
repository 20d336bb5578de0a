"""What the plans of the score networks launch on a GPU, without the networks: ``launches.json``, a row per kind.

``python -m bench.gpu_launches [NETWORK...]`` records full-sized networks again, and writes them into the file; it takes
minutes on a CPU, and 8 GB.
Rows of images are those of one image a member: a plan of B images a member launches the same with B times as many.
"""

import dataclasses
import gc
import json
import sys
from collections import Counter
from pathlib import Path

import torch

from bench.gpu_work import K, Work, plan_of, work_of
from bench.score_networks import NETWORKS
from fastens.engine import planned
from fastens.ops._tma_ways import Call
from fastens.plan.gpu.launch import Conv
from fastens.program.block import ConvBlock
from fastens.reference.group_moments import SPAN

RECORDED = 2  # members, of which a plan's launches are those of K with other numbers of rows
FILE = Path(__file__).with_name("launches.json")


@dataclasses.dataclass(frozen=True)
class Convolution:
    """A convolution of a plan: channels of x and skip, of the result, kernel, image, and what is before and behind it.

    ``moments`` and ``skip_moments`` are how many groups of x and skip have moments, ``norm_groups`` how many the norm
    has of both (0 for those of x), ``by_row`` whether scale and shift differ by image, ``groups`` how many of the
    result have moments, ``shared`` whether all members convolve the same images, ``summed`` whether the plan of a mean
    sums the members here.
    """

    channels: int
    outputs: int
    taps: int
    height: int
    out_height: int
    skip: int = 0
    stride: int = 1
    padding: int = 0
    moments: int = 0
    skip_moments: int = 0
    norm_groups: int = 0
    affine: bool = False
    by_row: bool = False
    activation: str = "none"
    bias: bool = False
    row_bias: bool = False
    residual: bool = False
    output_scale: float = 1.0
    output_activation: str = "none"
    groups: int = 0
    shared: bool = False
    summed: bool = False

    def __str__(self):
        channels = f"{self.channels}+{self.skip}" if self.skip else str(self.channels)
        parts = [f"{self.taps}x{self.taps} {channels} to {self.outputs} at {self.out_height}x{self.out_height}"]
        parts += [f"/{self.stride}"] * (self.stride > 1) + ["norm"] * bool(self.moments) + ["by row"] * self.by_row
        parts += [self.activation] * (self.activation != "none") + ["row bias"] * self.row_bias
        parts += ["residual"] * self.residual + ["moments"] * bool(self.groups) + ["shared"] * self.shared
        return " ".join(parts + ["summed"] * self.summed)

    def operations(self, batch):
        """Multiplications and additions of the products of all members."""
        return 2 * K * batch * self.out_height**2 * self.outputs * (self.channels + self.skip) * self.taps**2

    def call(self, batch, dtype):
        """The arguments of its ways at so many images a member, of tensors without memory, channels last."""
        rows, both = K * batch, self.channels + self.skip

        def empty(*shape, dtype=dtype):
            form = torch.channels_last if len(shape) == 4 and dtype != torch.float32 else torch.contiguous_format
            return torch.empty(shape, dtype=dtype, device="meta", memory_format=form)

        def moments(groups):
            return empty(rows, groups, -(-(self.height**2) // SPAN), 2, dtype=torch.float32) if groups else None

        def image(channels, height):
            size = (batch if self.shared else rows, channels, height, height)
            return torch.empty(size, dtype=dtype, device="meta", memory_format=torch.channels_last)

        weight = empty(K, self.outputs, self.taps, self.taps, both).movedim(4, 2)
        block = ConvBlock.of(
            image(self.channels, self.height), weight, empty(K, self.outputs) if self.bias else None,
            (self.stride,) * 2, (self.padding,) * 2,
            moments=moments(self.moments), norm_weight=empty(K, both) if self.affine else None,
            norm_bias=empty(K, both) if self.affine else None, eps=1e-6,
            scale=empty(rows, both) if self.by_row else None, shift=empty(rows, both) if self.by_row else None,
            activation=self.activation, row_bias=empty(rows, self.outputs) if self.row_bias else None,
            residual=image(self.outputs, self.out_height) if self.residual else None,
            output_scale=self.output_scale, output_activation=self.output_activation, num_groups=self.groups,
            skip=image(self.skip, self.height) if self.skip else None, skip_moments=moments(self.skip_moments),
            norm_groups=self.norm_groups,
        )  # fmt: skip
        return Call(block, (self.out_height,) * 2)


def convolution(launch, summed):
    """The convolution that a launch of a plan is."""
    block, before, behind = launch.block, launch.block.prologue, launch.block.epilogue
    (height, width), (out_height, out_width) = block.x.size[2:], launch.out.size[2:]
    stride, padding = block.stride, block.padding
    if height != width or out_height != out_width or stride[0] != stride[1] or padding[0] != padding[1]:
        raise ValueError(
            f"{launch.name}: {block.x.size} to {launch.out.size}; only square images and kernels have a row"
        )
    if block.offsets is not None or before.mask is not None:
        raise ValueError(f"{launch.name}: drawn rows and masks have no row")

    def channels(view):
        return 0 if view is None else view.size[1]

    return Convolution(
        block.x.size[1], launch.out.size[1], block.weight.shape[3], height, out_height, channels(before.skip),
        stride[0], padding[0], channels(before.moments), channels(before.skip_moments), before.norm_groups,
        before.norm_weight is not None, before.scale is not None, before.activation, block.bias is not None,
        behind.row_bias is not None, behind.residual is not None, behind.output_scale, behind.output_activation,
        behind.num_groups, block.shared, summed,
    )  # fmt: skip


def rows_of(plan):
    """A plan's launches as rows: how many there are of each convolution, and of what else does the same work."""
    convolutions, rest = Counter(), Counter()
    for i, launch in enumerate(plan._launches):
        if isinstance(launch, Conv):
            convolutions[convolution(launch, i == plan._last)] += 1
        else:
            work = work_of(launch)
            rest[launch.name, *(K / RECORDED * n for n in (work.operations, work.weights, work.images))] += 1
    changed = {field.name: field.default for field in dataclasses.fields(Convolution)}
    return {
        "convolutions": [
            {"number": number, **{k: v for k, v in dataclasses.asdict(conv).items() if v != changed[k]}}
            for conv, number in convolutions.items()
        ],
        "rest": [[number, name, *numbers] for (name, *numbers), number in rest.items()],
    }


def convolutions(name):
    """The convolutions of a network's plan, and how many there are of each."""
    rows = json.loads(FILE.read_text())[name]["convolutions"]
    return {Convolution(**{k: v for k, v in row.items() if k != "number"}): row["number"] for row in rows}


def rest(name):
    """What else its plan launches: number, kind and work of one image a member."""
    return [(number, kind, Work(*numbers)) for number, kind, *numbers in json.loads(FILE.read_text())[name]["rest"]]


def recorded(name):
    """The rows of a full-sized network, recorded now, on the CPU and in float32."""
    from bench import gpu_networks

    gpu_networks.REHEARSAL, gpu_networks.DEVICE, gpu_networks.DTYPE = False, "cpu", torch.float32
    planned.launches_on = lambda _: True
    gc.collect()  # an ensemble has cycles
    members, size = zip(*(gpu_networks.network(name, seed) for seed in range(RECORDED)), strict=True)
    return rows_of(plan_of(members, size[0], 1)[1])


def text(content):
    """The file's text: a row per line."""
    networks = []
    for name, kinds in content.items():
        lists = [f' "{kind}": [\n  ' + ",\n  ".join(map(json.dumps, rows)) + "\n ]" for kind, rows in kinds.items()]
        networks.append(f'"{name}": {{\n' + ",\n".join(lists) + "\n}")
    return "{\n" + ",\n".join(networks) + "\n}\n"


if __name__ == "__main__":
    for name in sys.argv[1:] or NETWORKS:
        content = json.loads(FILE.read_text()) if FILE.exists() else {}
        FILE.write_text(text(content | {name: recorded(name)}))
