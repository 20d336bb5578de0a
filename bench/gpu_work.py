"""What each launch of a score step must cost: ``python -m bench.gpu_work [FILE]`` writes it as Markdown, without a GPU.

The full-sized networks are recorded as a GPU runs them. A launch has operations, bytes that it reads or writes at least
once, and the time between two kernels of a graph; the largest of the three is its floor, and their sum a step's.
"""

import dataclasses
import gc
import math
import sys
from collections import defaultdict
from pathlib import Path

import torch

import fastens
from fastens.plan.gpu.launch import Conv, Linear, LinearGroup
from fastens.plan.graph import Attention, View
from fastens.plan.memory import Constant
from fastens.trace.record import mapped

K = 5
BATCHES = (1, 16, 256)
BETWEEN = 1.5e-6  # seconds from one kernel of a graph to the next
H200 = {"operations per second": 790e12, "bytes per second": 4.3e12}  # products and copies in bfloat16, as measured
ITEM = 2  # bytes of a bfloat16 number


@dataclasses.dataclass(frozen=True)
class Work:
    """Of one launch: multiplications and additions of its products, elements of weights, and elements of the rest.

    What is elementwise counts as bytes alone.
    """

    operations: float
    weights: float
    images: float

    def at(self, factor):
        """With that many times as many rows."""
        return Work(self.operations * factor, self.weights, self.images * factor)

    @property
    def bytes(self):
        return ITEM * (self.weights + self.images)

    def floor(self, limit, least=BETWEEN):
        """The least seconds."""
        return max(self.operations / limit["operations per second"], self.bytes / limit["bytes per second"], least)


def work_of(launch):
    """What a launch of a plan must do."""
    found = []
    mapped((View, torch.Tensor), found.append, launch.operands)
    weights = images = 0
    for x in {id(x) if isinstance(x, torch.Tensor) else x: x for x in found}.values():
        elements = math.prod(n for n, step in zip(size_of(x), stride_of(x), strict=True) if step)
        if isinstance(x, torch.Tensor) or isinstance(x.where, Constant):
            weights += elements
        else:
            images += elements
    return Work(operations_of(launch), weights, images)


def operations_of(launch):
    """Multiplications and additions of the products of a launch."""
    if isinstance(launch, Conv | Linear):
        weight = launch.block.weight if isinstance(launch, Conv) else launch.weight
        return 2 * math.prod(launch.out.size) * math.prod(weight.shape[2:])
    if isinstance(launch, LinearGroup):
        return sum(2 * math.prod(y.size) * w.shape[2] for y, w in zip(launch.outs, launch.weights, strict=True))
    if isinstance(launch, Attention):
        rows, heads, queries, width = launch.out.size
        return 2 * rows * heads * queries * launch.k.size[2] * (launch.q.size[3] + width)
    return 0


def size_of(x):
    return tuple(x.shape if isinstance(x, torch.Tensor) else x.size)


def stride_of(x):
    return tuple(x.stride() if isinstance(x, torch.Tensor) else x.stride)


def label(launch):
    """A launch as text: those of one label do the same work."""
    found = []
    mapped((View, torch.Tensor), found.append, launch.operands)
    return " ".join([launch.name, *(str(list(size_of(x))) for x in found)])


def plan_of(members, size, batch):
    """The ensemble of some members, and the launch plan of its step."""
    ensemble = fastens.Ensemble(list(members)).eval()
    x = torch.randn(batch, 3, size, size, device=ensemble.device).to(ensemble.dtype)
    with torch.no_grad():
        ensemble(x.contiguous(memory_format=torch.channels_last), torch.full((batch,), 500, device=x.device))
    if not ensemble._engine.plans.entries:
        raise RuntimeError(f"no plan: {ensemble.report().why_no_plan or ensemble.report().why}")
    (plan,) = [entry.plan for entry in ensemble._engine.plans.entries]
    return ensemble, plan


def table(name, launches):
    """A step's floor at each batch size, by kind of launch; ``launches`` are of one row a member."""
    kinds = defaultdict(list)
    for launch in launches:
        kinds[launch.name].append(work_of(launch))
    head = "".join(f" B={batch}: GFLOP | GB | floor, ms |" for batch in BATCHES)
    lines = [f"## {name}", "", f"| launch | number |{head}", "|---|---|" + "---|" * 3 * len(BATCHES)]
    order = sorted(kinds, key=lambda kind: -sum(work.at(BATCHES[-1]).floor(H200) for work in kinds[kind]))
    for kind, works in [
        *((kind, kinds[kind]) for kind in order),
        ("**all**", [w for ws in kinds.values() for w in ws]),
    ]:
        cells = ""
        for batch in BATCHES:
            own = [work.at(batch) for work in works]
            operations, moved = sum(w.operations for w in own) / 1e9, sum(w.bytes for w in own) / 1e9
            cells += f" {operations:.0f} | {moved:.2f} | {1e3 * sum(w.floor(H200) for w in own):.2f} |"
        lines.append(f"| {kind} | {len(works)} |{cells}")
    return "\n".join(lines)


def main(names):
    """The tables of the full-sized networks."""
    from bench import gpu_networks
    from fastens.engine import planned

    gpu_networks.REHEARSAL, gpu_networks.DEVICE, gpu_networks.DTYPE = False, "cpu", torch.float32
    planned.launches_on = lambda _: True

    def page(name):
        gc.collect()  # an ensemble has cycles
        members, size = zip(*(gpu_networks.network(name, seed) for seed in range(K)), strict=True)
        _, plan = plan_of(members, size[0], 1)
        return table(f"{name}, K={K}", plan._launches)

    return "\n\n".join(map(page, names)) + "\n"


if __name__ == "__main__":
    text = main(["songunet", "ddpmpp", "ffhq256"])
    Path(sys.argv[1]).write_text(text) if sys.argv[1:] else print(text)
