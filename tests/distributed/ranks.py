"""One rank of a spawned world: ``python -m tests.distributed.ranks FOLDER [CASE]``, as torchrun starts it."""

import datetime
import json
import os
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist


def main(folder, only=None):
    torch.set_num_threads(1)
    from tests.distributed.fault_cases import CASES

    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    rank, found = dist.get_rank(), {}
    for name, run in CASES.items():
        if only and name not in only.split(","):
            continue
        begun = time.perf_counter()
        try:
            run(dist.get_world_size())
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
        if only or os.environ.get("SHOW"):
            print(name, rank, f"{time.perf_counter() - begun:.1f}", found[name], flush=True)
        dist.barrier()
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(*sys.argv[1:])
