"""The ranks of several worlds, forked from a process that has imported everything once.

``python -m tests.distributed.ranks FOLDER [WORLDS [CASES]]``, as in ``runs 2,4 gradients,likelihood``.
"""

import datetime
import json
import os
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed.bit_cases import CASES
from tests.distributed.cases import OF_SEVERAL

WORLDS = (1, 2, 4)


def cases_of(world):
    """Their names."""
    return [name for name in CASES if world > 1 or name not in OF_SEVERAL]


def rank_of(world, rank, folder, names):
    """Run the cases as one rank, and write what failed."""
    store = f"file://{folder}/store{world}"
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=world, timeout=datetime.timedelta(seconds=60)
    )
    found = {}
    for name in names:
        begun = time.process_time()
        try:
            CASES[name](world)
            found[name] = ""
        except (Exception, pytest.fail.Exception):
            found[name] = traceback.format_exc()
        if os.environ.get("SHOW"):
            print(name, world, rank, f"{time.process_time() - begun:.1f}", found[name], flush=True)
        dist.barrier()
    (folder / f"{world}-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def forked(world, rank, folder, names):
    """The process of a rank."""
    child = os.fork()
    if not child:
        code = 1
        try:
            rank_of(world, rank, folder, names)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    return child


def main(folder, worlds=None, names=None):
    """Run the worlds one after the other."""
    torch.set_num_threads(1)
    for world in map(int, worlds.split(",")) if worlds else WORLDS:
        cases = names.split(",") if names else cases_of(world)
        ranks = [forked(world, rank, Path(folder).absolute(), cases) for rank in range(world)]
        if any([os.waitpid(rank, 0)[1] for rank in ranks]):
            sys.exit(f"a rank of {world} failed")


if __name__ == "__main__":
    main(*sys.argv[1:])
