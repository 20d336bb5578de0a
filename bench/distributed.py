"""An ensemble over ranks on this machine against one process: time, and bytes against the formula.

``torchrun --nproc-per-node 2 -m bench.distributed``, one thread a rank. Rounds are interleaved; where the loopback
device carries nothing else (``unshare -rn sh -c "ip link set lo up; torchrun ..."``), what it carried is printed too.
"""

import json
import os
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import fastens
from fastens.distributed.slices import wire_bytes
from tests.networks import randomised, unet_2d

K, ROWS, ROUNDS, CALLS = 4, 16, 7, 3


def loopback():
    """Bytes that the loopback device has sent."""
    line = next(line for line in Path("/proc/self/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def seconds(model, *arguments):
    begun = time.perf_counter()
    for _ in range(CALLS):
        model(*arguments)
    return (time.perf_counter() - begun) / CALLS


@torch.no_grad()
def main():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    world, rank = dist.get_world_size(), dist.get_rank()
    ens = fastens.Ensemble([randomised(lambda: unet_2d(False, sample_size=16), seed) for seed in range(K)])
    x, t = torch.randn(ROWS, 1, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor(7)
    mesh = init_device_mesh("cpu", (world, 1), mesh_dim_names=("member", "data"))
    spread = fastens.distribute(ens, mesh)
    share = fastens.Ensemble([ens.members[k] for k in range(K)][spread._share.slice])
    for rule in ("mean", "median"):
        ens.rule = spread.rule = share.rule = rule
        for model in (ens, spread, share):
            seconds(model, x, t)
        times = {"one process": [], "mesh": [], "share": []}
        exchange = spread._place.members
        for _ in range(ROUNDS):
            for name, model in (("one process", ens), ("share", share), ("mesh", spread)):
                dist.barrier()
                times[name].append(seconds(model, x, t))
        dist.barrier()
        sent, carried = exchange.sent, loopback()
        spread(x, t)
        dist.barrier()
        sent, carried = exchange.sent - sent, loopback() - carried
        error = float((spread(x, t).sample - ens(x, t).sample).abs().max())
        partial = rule == "mean" and -(-K // world) > 1
        wanted = wire_bytes((ROWS, 1, 16, 16), 4, K, world, partial)
        if rank == 0:
            medians = {name: round(1e3 * statistics.median(each), 2) for name, each in times.items()}
            overhead = medians["mesh"] - medians["share"]
            found = {"ranks": world, "rule": rule, "ms": medians, "overhead ms": round(overhead, 2), "error": error}
            data = {"sent by rank 0": sent, "formula": wanted[0], "formula, all": sum(wanted), "loopback": carried}
            print(json.dumps({**found, **data, "load": round(os.getloadavg()[0], 1)}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
