"""Where a score step's time goes, by kernel: ``python -m bench.gpu_profile FILE`` writes Markdown for each network.

What a goal misses, this and ``ncu`` on the kernels that it names have to explain.
"""

import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import fastens
from bench.gpu_contest import DEVICE, DTYPE, REHEARSAL, environment
from bench.gpu_networks import NETWORKS, network

K = 5
CALLS = 3
WARM_UP = 8  # calls, in which the plan is made and recorded
LINES = 15


def profiled(name, batch):
    """The kernels that take most of one step, largest first."""
    members, size = zip(*(network(name, seed) for seed in range(K)), strict=True)
    x = torch.randn(batch, 3, size[0], size[0], device=DEVICE).to(DTYPE, memory_format=torch.channels_last)
    t = torch.full((batch,), 500, device=DEVICE)
    ensemble = fastens.Ensemble(members).eval()
    with torch.no_grad():
        for _ in range(WARM_UP):
            ensemble(x, t)
        with profile(activities=[ProfilerActivity.CPU, *([] if REHEARSAL else [ProfilerActivity.CUDA])]) as recorded:
            for _ in range(CALLS):
                ensemble(x, t)
    kind = "self_cpu_time_total" if REHEARSAL else "self_device_time_total"
    kernels = sorted(recorded.key_averages(), key=lambda event: -getattr(event, kind))
    total = sum(getattr(event, kind) for event in kernels) or 1
    lines = [f"## {name}, K={K}, B={batch}: {total / CALLS / 1e3:.3f} ms in kernels", "", "| share | calls | kernel |"]
    lines += ["|---|---|---|"]
    for event in kernels[:LINES]:
        share, calls = 100 * getattr(event, kind) / total, event.count // CALLS
        lines.append(f"| {share:.1f} % | {calls} | {event.key[:100].replace('|', ' ')} |")
    return "\n".join(lines)


if __name__ == "__main__":
    batches = (1,) if REHEARSAL else (1, 16)
    pages = [str(environment()), *(profiled(name, batch) for name in NETWORKS for batch in batches)]
    Path(sys.argv[1]).write_text("\n\n".join(pages) + "\n")
