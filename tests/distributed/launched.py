"""What a user starts on several processes, whoever starts them: an ensemble over all of them, held against one."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import fastens
from tests.networks import mlp, randomised


def main(folder):
    """Write the rank's number where it gets what one process does."""
    if not dist.is_initialized():  # else by who started it
        dist.init_process_group("gloo")
    ens = fastens.Ensemble([randomised(mlp, seed) for seed in range(3)], "median")
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    spread = fastens.distribute(ens, init_device_mesh("cpu", (2, 1), mesh_dim_names=("member", "data")), timeout=60)
    with torch.no_grad():
        assert torch.allclose(spread(x), ens(x), atol=1e-6)
    (Path(folder) / str(dist.get_rank())).touch()


if __name__ == "__main__":
    main(sys.argv[1])
