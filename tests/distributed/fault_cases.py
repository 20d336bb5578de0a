"""What is wrong with one rank is an error, or the right result, on all."""

import copy
import re

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import fastens
from fastens.distributed.exchange import RankLost, RanksDiffer
from fastens.training import member_forward
from tests.distributed.cases import CASES, K, batch, case, case_of_several, close, meshes, nets

__all__ = ["CASES"]  # these and the others


@case
def not_a_number_on_one_rank(world):
    for rule in ("mean", "median", "geometric", "dominant", "max_abs", "sum"):
        members = nets()
        with torch.no_grad():
            members[3][-1].bias[1] = torch.nan
        ens = fastens.Ensemble(members, rule)
        for mesh in meshes(world):
            spread = fastens.distribute(ens, mesh, timeout=60)
            with torch.no_grad():
                out = spread(batch(5, 5))
                assert out[:, 1].isnan().all()
                close(out, ens(batch(5, 5)))


def raises(kind, what, call, *args, **kwargs):
    with pytest.raises(kind, match=re.escape(what)):
        call(*args, **kwargs)


@case_of_several
def other_weights_on_one_rank(world):
    members = nets()
    if dist.get_rank() == world - 1:
        with torch.no_grad():
            members[0][0].bias[0] += 1e-3
    for mesh in meshes(world):
        ens = fastens.Ensemble(members)
        raises(RanksDiffer, f"the weights of rank {world - 1}", fastens.distribute, ens, mesh, timeout=60)
    mesh = meshes(world)[1]
    raises(RanksDiffer, "the weights of member", fastens.distribute, members, mesh, timeout=60)


@case_of_several
def other_code_or_settings_on_one_rank(world):
    from fastens.distributed import shares

    ens = fastens.Ensemble(nets(), "median" if dist.get_rank() else "mean")
    mesh = meshes(world)[0]
    raises(RanksDiffer, "the ensemble's rule of rank 1", fastens.distribute, ens, mesh, timeout=60)
    kept = shares._package
    shares._package = lambda: str(dist.get_rank()).encode()
    try:
        raises(RanksDiffer, "the code", fastens.distribute, fastens.Ensemble(nets()), mesh, timeout=60)
    finally:
        shares._package = kept


@case_of_several
def other_batches_on_one_rank(world):
    spread = fastens.distribute(fastens.Ensemble(nets()), meshes(world)[0], timeout=60)
    with torch.no_grad():
        raises(RanksDiffer, "other values", spread, batch(4, 5, seed=dist.get_rank()))
        raises(RanksDiffer, "other shapes", spread, batch(4 + dist.get_rank(), 5))
        close(spread(batch(4, 5)), fastens.Ensemble(nets())(batch(4, 5)))


@case_of_several
def one_rank_fails(world):
    members = nets()
    spread = fastens.distribute(fastens.Ensemble(members), meshes(world)[0], timeout=60)
    held, own = spread._held, dist.get_rank() == world - 1

    def fails(_):
        raise MemoryError("no memory here")

    spread._held = fails if own else held
    kind, what = (MemoryError, "no memory here") if own else (RankLost, f"rank {world - 1} failed in this call")
    with torch.no_grad():
        raises(kind, what, spread, batch(4, 5))
        spread._held = held
        close(spread(batch(4, 5)), fastens.Ensemble(members)(batch(4, 5)))


@case_of_several
def a_slow_rank_is_waited_for(world):
    import time

    spread = fastens.distribute(fastens.Ensemble(nets()), meshes(world)[0], timeout=60)
    if dist.get_rank() == 1:
        time.sleep(0.5)
    with torch.no_grad():
        close(spread(batch(4, 5)), fastens.Ensemble(nets())(batch(4, 5)))


@case
def what_no_rank_can_do_is_an_error(world):
    spread = fastens.distribute(fastens.Ensemble(nets()), meshes(world)[0], timeout=60)
    raises(TypeError, "distribute the ensemble again", copy.deepcopy, spread)
    raises(ValueError, "no rank has all members", spread.save_pretrained, "nowhere")
    raises(ValueError, "no rank has all members", getattr, spread, "members")
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("data",))
    raises(ValueError, "('member', 'data')", fastens.distribute, fastens.Ensemble(nets()), mesh)
    with pytest.raises(RuntimeError, match="is not trained"):
        spread.train()(batch(4, 5))
    with pytest.raises(ValueError, match="is not trained"):
        member_forward(spread, batch(K, 4, 5))

    class Net(nn.Linear):
        def encode(self, x):
            return x + 1

        def forward_twice(self, x):
            return self(self.forward(x))

        def forward_weight(self, x):
            return self(x) @ self.weight

    named = fastens.distribute(fastens.Ensemble(nets(2, lambda: Net(5, 5))), meshes(world)[0], timeout=60)
    raises(ValueError, "encode: over a mesh", named.encode, batch(4, 5))
    raises(ValueError, "forward_weight: over a mesh", named.forward_weight, batch(4, 5))
    with torch.no_grad():
        close(named.forward_twice(batch(4, 5)), named(named(batch(4, 5))))
