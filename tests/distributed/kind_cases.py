"""What random networks, calls and meshes showed, by kind: what a rank has must not decide what it computes."""

import warnings

import torch
from torch import nn

import fastens
from tests.distributed.bit_cases import CASES, DTYPES, held_against, members_of, same
from tests.distributed.bit_cases import call as call_of
from tests.distributed.cases import K, batch, case, close, meshes, nets
from tests.distributed.networks import Convolutional, Deeper, OfTorch
from tests.networks import randomised

__all__ = ["CASES"]  # these and the others


class Counting(nn.Module):
    """It computes otherwise where there are so many rows: those of a call, of a rank's part, of its members' rows."""

    def __init__(self, at):
        super().__init__()
        self.first, self.last, self.at = nn.Linear(5, 8), nn.Linear(8, 5), at
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        h = self.drop(self.first(x))
        return self.last(h.sin() if h.numel() // 8 == self.at else h)


@case
def networks_that_ask_how_many_rows_there_are(world):
    rows, assigned = 5, [1, 1, 2, 0, 2]
    for at in (1, 3, 6, 15):
        members = [randomised(lambda at=at: Counting(at), seed) for seed in range(3)]
        for ens in (fastens.Ensemble(members, "geometric"), fastens.MCDropout(members[0], 3, "median")):
            for mesh in meshes(world):
                spread = fastens.distribute(ens, mesh, timeout=60)
                with torch.no_grad(), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    close(spread(batch(rows, 5)), ens(batch(rows, 5)), 1e-5)
                    with ens.assigned(assigned), spread.assigned(assigned):
                        close(spread(batch(rows, 5)), ens(batch(rows, 5)))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 16), nn.Dropout(0.3), nn.Linear(16, 5))

    def forward(self, x, c):
        return self.net(x) * c + c


def _gradients(model, own, x):
    x, own = x.clone().requires_grad_(), own.clone().requires_grad_()
    out = model(x, fastens.PerMember(list(own)))
    return torch.autograd.grad(out.square().sum(), (x, own))


@case
def gradients_of_each_members_arguments(world):
    for count in (1, 3):
        for ens in (
            fastens.Ensemble(nets(count, Scaled), "median"),
            fastens.MCDropout(randomised(Scaled, 0), count),
        ):
            own = batch(count, 1, seed=7)
            for mesh in meshes(world):
                spread = fastens.distribute(ens, mesh, timeout=60)
                for found, wanted in zip(
                    _gradients(spread, own, batch(3, 5)), _gradients(ens, own, batch(3, 5)), strict=True
                ):
                    close(found, wanted, 1e-5)


@case
def bits_where_a_rank_has_fewer_members_than_a_pass_takes(world):
    """And one process has more: a row has a plan on all of them, or on none."""
    for dtype in DTYPES:
        ens = fastens.Ensemble(members_of(Convolutional, dtype, count=4), max_fold=2)
        held_against(world, ens, lambda model, dtype=dtype: [model(*call_of(3, dtype))], dtype)


@case
def bits_of_masks_without_a_plan(world):
    """Of one row with one mask there may be one."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Dropout(0.4), nn.Linear(18, 16), nn.PReLU(), nn.Linear(16, 18))

        def forward(self, x, t):
            h = self.layers(x.flatten(1))
            return (h * h.new_full((1,), 2.0).sin()).view_as(x) * t.view(-1, 1, 1, 1)

    for dtype in DTYPES:
        for masks in ("fixed", "fresh"):
            ens = fastens.MCDropout(randomised(Net, 0).to(dtype), 2, "median", masks=masks, seed=3)

            def evaluate(model, dtype=dtype):
                with model.trajectory(3, 5):
                    return [model(*call_of(3, dtype)), model.member_outputs(*call_of(3, dtype))]

            held_against(world, ens, evaluate, (dtype, masks))


@case
def bits_of_gradients_by_any_members(world):
    """Of different structure, and with arguments of their own."""
    members = [*members_of(OfTorch, count=3), *members_of(Deeper, count=2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ens = fastens.Ensemble(members)

    def evaluate(model):
        with torch.enable_grad():
            x, t = call_of(2)
            x.requires_grad_()
            return [torch.autograd.grad(model(x, t).square().sum(), x)[0]]

    held_against(world, ens, evaluate)
    for other in (fastens.Ensemble(nets(K, Scaled)), fastens.MCDropout(randomised(Scaled, 0), K)):
        own = batch(K, 1, seed=7)
        with fastens.deterministic():
            wanted = _gradients(other, own, batch(2, 5))
            for mesh in meshes(world):
                spread = fastens.distribute(other, mesh, timeout=60)
                for a, b in zip(_gradients(spread, own, batch(2, 5)), wanted, strict=True):
                    same(a, b, mesh.shape)
