"""What torch does to modules on several devices: an ensemble trains as it is, or says that it cannot be cut."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import fastens
from fastens.training import member_forward
from tests.networks import mlp, randomised


@pytest.fixture(scope="module")
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def fully_sharded(ensemble, mesh):
    from torch.distributed.fsdp import fully_shard

    return fully_shard(ensemble, mesh=mesh)


def flat(ensemble, mesh):
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(ensemble, device_id=torch.device("cpu"))


def column_wise(ensemble, mesh):
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    return parallelize_module(ensemble, mesh, {"network.0": ColwiseParallel()})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cut", [fully_sharded, flat, column_wise])
def test_what_would_cut_stacks_is_named(cut, mesh):
    ensemble = fastens.Ensemble([randomised(mlp, seed) for seed in range(3)])
    with pytest.raises(ValueError, match=r"is a stack of an ensemble.*DistributedDataParallel trains on several"):
        cut(ensemble, mesh)


class OwnRows(torch.nn.Module):
    def __init__(self, ensemble):
        super().__init__()
        self.ensemble = ensemble

    def forward(self, x):
        return member_forward(self.ensemble, x)


def test_data_parallel_gives_the_members_gradients(mesh):
    members = [randomised(mlp, seed) for seed in range(3)]
    ensemble, members = fastens.Ensemble(members), [copy.deepcopy(member) for member in members]
    parallel = torch.nn.parallel.DistributedDataParallel(OwnRows(ensemble))
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        parallel.zero_grad()
        parallel(x).square().sum().backward()
    for k, member in enumerate(members):
        member(x[k]).square().sum().backward()
        for p, stack in zip(member.parameters(), ensemble.parameters(), strict=True):
            torch.testing.assert_close(stack.grad[k], p.grad, rtol=1e-4, atol=1e-5)
