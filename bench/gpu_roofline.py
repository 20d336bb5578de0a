"""The roofline of each network's convolutions: ``python -m bench.gpu_roofline DIR [BATCH...]``.

Every different convolution of one score step of K = 5 members is measured in each way that takes it; the plot shows
operations per second against operations per byte, below the same run's matrix products and copies. What is measured is
kept in the table of choices, so that a run that was stopped goes on where it was.
"""

import json
import math
import sys
from pathlib import Path

import torch

import fastens
from bench.gpu_contest import DEVICE, DTYPE, REHEARSAL, _clock, copy_of, environment
from bench.gpu_networks import NETWORKS, network
from fastens.ops._choice import device_name
from fastens.ops.conv import CHOICE
from fastens.tune import calls_of, tune

K = 5


def work_of(arguments):
    """Operations of a convolution, and the bytes that it reads and writes at least."""
    x, weight, bias, stride, padding, dilation, transposed, _, groups = arguments[:9]
    if transposed:
        raise ValueError("work_of: a transposed convolution; the networks have none")
    space = [
        (n + 2 * p - d * (taps - 1) - 1) // s + 1
        for n, taps, s, p, d in zip(x.shape[2:], weight.shape[3:], stride, padding, dilation, strict=True)
    ]
    outputs = x.shape[0] * weight.shape[1] * math.prod(space)
    operations = 2 * outputs * (x.shape[1] // groups) * weight.shape[3:].numel()
    elements = x.numel() + weight.numel() + (0 if bias is None else bias.numel()) + outputs
    return operations, elements * x.element_size()


def layers(name, batch):
    """One row per different convolution of a network: its work, and the seconds of each way."""
    members = [network(name, seed)[0] for seed in range(K)]
    ensemble = fastens.Ensemble(members).eval()
    calls = calls_of(ensemble, [batch])
    device = ensemble.device
    tune(calls, device)
    for (op, key), (_, arguments) in calls.items():
        entry = CHOICE.table.find(device_name(device), op, key)
        operations, moved = work_of(arguments)
        yield {"network": name, "batch": batch, "layer": key, "operations": operations, "bytes": moved, **entry}


def limits():
    """Operations and bytes per second of this device, as a matrix product and a copy reach them."""
    n = 256 if REHEARSAL else 8192
    a, b = (torch.randn(n, n, device=DEVICE).to(DTYPE) for _ in "ab")
    product = min(_clock(lambda: a @ b) for _ in range(10))
    moved = 2**20 if REHEARSAL else 2**31
    copy = copy_of(moved)
    copied = min(_clock(copy) for _ in range(10))
    return {"operations per second": 2 * n**3 / product, "bytes per second": moved / copied}


def plot(rows, limit, path):
    """Operations per second against operations per byte, a point per convolution and kind of way, and the roof."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = sorted({row["network"] for row in rows})
    figure, axes = plt.subplots(1, len(names), figsize=(5 * len(names), 4), constrained_layout=True, squeeze=False)
    peak, bandwidth = limit["operations per second"], limit["bytes per second"]
    for axis, name in zip(axes[0], names, strict=True):
        own = [row for row in rows if row["network"] == name and row["seconds"]]
        for ours, colour in ((True, "tab:blue"), (False, "tab:orange")):
            points = [
                (row["operations"] / row["bytes"], row["operations"] / min(seconds))
                for row in own
                if (seconds := [s for way, s in row["seconds"].items() if way.startswith("triton") is ours])
            ]
            if points:
                axis.scatter(*zip(*points, strict=True), s=14, c=colour, label="ours" if ours else "library")
        low = min((row["operations"] / row["bytes"] for row in own), default=1.0)
        knee, far = peak / bandwidth, 1e4
        axis.plot([low, knee, max(far, knee)], [low * bandwidth, peak, peak], color="0.4", linewidth=1)
        axis.set(xscale="log", yscale="log", title=name, xlabel="operations per byte", ylabel="operations per second")
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(folder, batches):
    """Measure, write roofline.json and draw roofline.png."""
    if not DEVICE:
        raise SystemExit("gpu_roofline needs a CUDA device, or FASTENS_BENCH_DEVICE=cpu to rehearse")
    folder.mkdir(parents=True, exist_ok=True)
    limit = limits()
    rows = [
        row
        for name in NETWORKS
        for batch in batches
        if not (name == "ffhq256" and batch > 16)
        for row in layers(name, batch)
    ]
    content = {"limits": limit, "layers": rows, **environment()}
    (folder / "roofline.json").write_text(json.dumps(content, indent=1) + "\n")
    plot(rows, limit, folder / "roofline.png")
    print(f"{len(rows)} convolutions: {folder / 'roofline.json'}, {folder / 'roofline.png'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(batch) for batch in sys.argv[2:]] or ([1] if REHEARSAL else [1, 16, 256]))
