"""Where the time of a score step goes, launch by launch: ``python -m bench.gpu_roofline DIR [BATCH...]``.

Every different launch of the plans of K = 5 members is measured alone, ten times in a CUDA graph, beside its floor at
this run's matrix products and copies. The plot shows operations per second against operations per byte below that roof;
``roofline.md`` says for each kind of launch what it takes and what it would at its floor, which explains a missed goal.
"""

import functools
import importlib.util
import json
import statistics
import sys
from collections import Counter
from pathlib import Path

import torch

from bench.gpu_contest import DEVICE, DTYPE, REHEARSAL, clock, copy_of, environment
from bench.gpu_networks import NETWORKS, network
from bench.gpu_work import K, label, plan_of, work_of
from fastens.ops._clock import clock as launch_clock
from fastens.plan.gpu.launch import function_of

ROUNDS = 3 if REHEARSAL else 20


def launches(name, batch, limit):
    """One row per different launch of a network's step: how many there are, their work, floor and seconds."""
    members, size = zip(*(network(name, seed) for seed in range(K)), strict=True)
    _ensemble, plan = plan_of(members, size[0], batch)
    del members
    labels = [label(launch) for launch in plan._launches]
    numbers = Counter(labels)
    for launch, text, (_, operands) in zip(plan._launches, labels, plan._bound.launches, strict=True):
        if text not in numbers:
            continue
        work = work_of(launch)
        with torch.no_grad():
            once = launch_clock(functools.partial(function_of(launch), **operands), torch.device(DEVICE))
            seconds = statistics.median(once() for _ in range(ROUNDS))
        yield {
            "network": name, "batch": batch, "launch": text, "kind": launch.name, "number": numbers.pop(text),
            "operations": work.operations, "bytes": work.bytes, "floor": work.floor(limit), "seconds": seconds,
        }  # fmt: skip


def limits():
    """Operations and bytes per second of this device, as a matrix product and a copy reach them."""
    n = 256 if REHEARSAL else 8192
    a, b = (torch.randn(n, n, device=DEVICE).to(DTYPE) for _ in "ab")
    product = min(clock(lambda: a @ b) for _ in range(10))
    moved = 2**20 if REHEARSAL else 2**31
    copy = copy_of(moved)
    copied = min(clock(copy) for _ in range(10))
    return {"operations per second": 2 * n**3 / product, "bytes per second": moved / copied}


def table(rows):
    """For each network and batch size, what each kind of launch takes and what it would at its floor."""
    lines = ["| network | B | launch | number | ms | floor, ms | of the floor |", "|---|---|---|---|---|---|---|"]
    for name, batch in dict.fromkeys((row["network"], row["batch"]) for row in rows):
        own = [row for row in rows if (row["network"], row["batch"]) == (name, batch)]
        kinds = dict.fromkeys(row["kind"] for row in own)
        for kind in [*kinds, "**all**"]:
            part = [row for row in own if kind in (row["kind"], "**all**")]
            number = sum(row["number"] for row in part)
            seconds, least = (sum(row["number"] * row[key] for row in part) for key in ("seconds", "floor"))
            ratio = seconds / least
            lines.append(
                f"| {name} | {batch} | {kind} | {number} | {1e3 * seconds:.3f} | {1e3 * least:.3f} | {ratio:.2f} |"
            )
    return "\n".join(lines) + "\n"


def plot(rows, limit, path):
    """Operations per second against operations per byte, a point per launch with products, and the roof."""
    if importlib.util.find_spec("matplotlib") is None:
        print(f"no {path.name}: matplotlib is not installed")
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["network"] for row in rows))
    figure, axes = plt.subplots(1, len(names), figsize=(5 * len(names), 4), constrained_layout=True, squeeze=False)
    peak, bandwidth = limit["operations per second"], limit["bytes per second"]
    for axis, name in zip(axes[0], names, strict=True):
        own = [row for row in rows if row["network"] == name and row["operations"]]
        for batch in sorted({row["batch"] for row in own}):
            points = [
                (row["operations"] / row["bytes"], row["operations"] / row["seconds"])
                for row in own
                if row["batch"] == batch
            ]
            axis.scatter(*zip(*points, strict=True), s=14, label=f"B={batch}")
        low = min(row["operations"] / row["bytes"] for row in own)
        knee, far = peak / bandwidth, 1e4
        axis.plot([low, knee, max(far, knee)], [low * bandwidth, peak, peak], color="0.4", linewidth=1)
        axis.set(xscale="log", yscale="log", title=name, xlabel="operations per byte", ylabel="operations per second")
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(folder, batches):
    """Measure, write roofline.json and roofline.md, and draw roofline.png; what is measured is not measured again."""
    if not DEVICE:
        raise SystemExit("gpu_roofline needs a CUDA device, or FASTENS_BENCH_DEVICE=cpu to rehearse")
    folder.mkdir(parents=True, exist_ok=True)
    where = environment()
    kept = folder / "roofline.json"
    content = json.loads(kept.read_text()) if kept.exists() else {}
    if any(content.get(key) != where[key] for key in ("commit", "device")):
        content = {"limits": limits(), "launches": [], **where}
    rows = content["launches"]
    for name in NETWORKS:
        for batch in batches:
            if (name == "ffhq256" and batch > 16) or any((r["network"], r["batch"]) == (name, batch) for r in rows):
                continue
            rows += launches(name, batch, content["limits"])
            kept.write_text(json.dumps(content, indent=1) + "\n")
            torch.cuda.empty_cache()
    (folder / "roofline.md").write_text(table(rows))
    plot(rows, content["limits"], folder / "roofline.png")
    print(table(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(batch) for batch in sys.argv[2:]] or ([1] if REHEARSAL else [1, 16, 256]))
