"""What an ensemble's step takes on many H200: a paper model. ``python -m bench.scale_model [--gpus 64]``.

A mesh of m x d GPUs holds k = ceil(K / m) members each and evaluates b = ceil(B / d) rows of a batch of B. A step is

    compute         max(F k b / rate, weights / bandwidth) + tile waves + kernels * gap, of F operations a row
    communication   2 (latency + (m - 1) post) + (k + 1) (m - 1) / m * b * row / link: to the slices' ranks and back
                    latency + (d - 1) post + (d - 1) b * row / link: with batch="global" only

Data parallelism is the mesh 1 x d: every GPU has all members and samples rows of its own, and nothing is sent
(batch="local", as jobs of ``fastens sample`` do). With ``--global`` one sampler runs on all GPUs and gets all rows.

Rate, bandwidth and gap are measured on one device (790 TFLOP/s in bfloat16, 4.3 TB/s, 1.5 us between kernels), and so
is what tile waves add (0.143 ms for one image of SongUNet, where its operations alone would take 0.053). Links are
published figures: NVLink 450 GB/s in each direction within a node of 8, 400 Gb/s between nodes; latencies of 10 and
20 us, and 2 us to post a message, are assumed. Nothing here was measured on more than one GPU.
"""

import argparse
import dataclasses
import math

RATE, BANDWIDTH, GAP = 790e12, 4.3e12, 1.5e-6
OCCUPANCY = 0.09e-3  # seconds of a step that tile waves add at one image, as measured of SongUNet
NODE, NVLINK, NETWORK = 8, 450e9, 50e9
POST = 2e-6
LATENCY = {NVLINK: 10e-6, NETWORK: 20e-6}
ITEM = 2


@dataclasses.dataclass(frozen=True)
class Network:
    """Operations of one row, parameters, kernels of a step, and elements of a row of the output."""

    name: str
    operations: float
    parameters: float
    kernels: int
    row: int


NETWORKS = (
    Network("SongUNet 32x32", 42.4e9, 55.7e6, 173, 3 * 32 * 32),
    Network("DDPM++ 32x32", 21.7e9, 62e6, 173, 3 * 32 * 32),
    Network("FFHQ 256x256", 388e9, 66e6, 260, 3 * 256 * 256),
    Network("2.6 B U-Net, latents 128x128", 5.98e12, 2.6e9, 900, 4 * 128 * 128),
)


@dataclasses.dataclass(frozen=True)
class Step:
    """Seconds of one evaluation."""

    compute: float
    communication: float

    @property
    def seconds(self):
        return self.compute + self.communication


def compute(network, members, rows):
    """Of k members on b rows in one folded pass."""
    operations = network.operations * members * rows / RATE
    weights = ITEM * network.parameters * members / BANDWIDTH
    return max(operations, weights) + OCCUPANCY + network.kernels * GAP


def link(gpus):
    """The slowest link among so many GPUs."""
    return NVLINK if gpus <= NODE else NETWORK


def step(network, total, batch, m, d, whole=False):
    """On a mesh of m x d, members within a node where they fit; ``whole``: all ranks get the whole batch."""
    members, rows = math.ceil(total / m), math.ceil(batch / d)
    size = rows * network.row * ITEM
    seconds = 0.0
    if m > 1:
        speed = link(m)
        seconds += 2 * (LATENCY[speed] + (m - 1) * POST) + (members + 1) * (m - 1) / m * size / speed
    if d > 1 and whole:
        speed = link(m * d)
        seconds += LATENCY[speed] + (d - 1) * POST + (d - 1) * size / speed
    return Step(compute(network, members, rows), seconds)


def meshes(gpus, total):
    """The meshes of so many GPUs, with no more ranks of members than members."""
    return [(m, gpus // m) for m in range(1, min(gpus, total) + 1) if gpus % m == 0]


def crossover(network, total, gpus, whole=False, most=2**16):
    """The largest batch of one sampler at which some split of the members beats data parallelism; none if never."""
    found = None
    for batch in (2**i for i in range(int(math.log2(most)) + 1)):
        data = step(network, total, batch, 1, gpus, whole).seconds
        if min(step(network, total, batch, m, d, whole).seconds for m, d in meshes(gpus, total) if m > 1) < data:
            found = batch
    return found


def table(total, gpus, whole=False, batches=(1, 16, 256, 4096)):
    """Lines of Markdown."""
    yield f"| K = {total}, {gpus} H200 | B | one GPU, ms | data parallel, ms | mesh | compute + communication, ms |"
    yield "|---|---|---|---|---|---|"
    for network in NETWORKS:
        for batch in batches:
            alone = step(network, total, batch, 1, 1).seconds
            data = step(network, total, batch, 1, gpus, whole).seconds
            m, d = min(meshes(gpus, total), key=lambda mesh: step(network, total, batch, *mesh, whole).seconds)
            best = step(network, total, batch, m, d, whole)
            parts = f"{1e3 * best.compute:.2f} + {1e3 * best.communication:.2f}"
            yield f"| {network.name} | {batch} | {1e3 * alone:.2f} | {1e3 * data:.2f} | {m} x {d} | {parts} |"
    yield ""
    yield "| network | member parallelism is faster up to B |"
    yield "|---|---|"
    for network in NETWORKS:
        yield f"| {network.name} | {crossover(network, total, gpus, whole) or 'never'} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=64)
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--global", action="store_true", dest="whole", help="one sampler on all GPUs")
    options = parser.parse_args()
    print("\n".join(table(options.members, options.gpus, options.whole)))


if __name__ == "__main__":
    main()
