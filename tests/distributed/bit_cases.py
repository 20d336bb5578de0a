"""Deterministic mode: what a mesh gives has the bits of one process, whatever its shape."""

import warnings

import torch
from torch import nn

import fastens
from tests.distributed.cases import RULES, batch, case, meshes
from tests.distributed.fault_cases import CASES
from tests.distributed.networks import Convolutional, Deeper, OfTorch, Reading
from tests.fuzz.bits import bits
from tests.networks import randomised

__all__ = ["CASES"]  # these and the others

K = 5
DTYPES = (torch.float32, torch.bfloat16)


def members_of(kind, dtype=torch.float32, count=K):
    return [randomised(kind, seed).to(dtype) for seed in range(count)]


def call(rows, dtype=torch.float32):
    return batch(rows, 2, 3, 3, seed=rows).to(dtype), torch.linspace(0.2, 0.8, rows).to(dtype)


def same(found, wanted, what=""):
    assert found.shape == wanted.shape
    assert torch.equal(bits(found), bits(wanted)), (what, float((found - wanted).abs().max()))


def held_against(world, ens, evaluate, what="", calls=2):
    """What each mesh gives, in the mode, and what one process does."""
    with torch.no_grad(), fastens.deterministic(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = evaluate(ens)
        for mesh in meshes(world):
            spread = fastens.distribute(ens, mesh, timeout=60)
            for _ in range(calls):  # the first, and later ones
                for a, b in zip(evaluate(spread), wanted, strict=True):
                    same(a, b, (what, mesh.shape))


@case
def bits_of_every_rule_and_mesh(world):
    rules = [rule for rule in RULES if rule != fastens.rules.Geometric("batch")]
    for kind in (Convolutional, OfTorch):
        for dtype in DTYPES:
            ens = fastens.Ensemble(members_of(kind, dtype), prediction="epsilon")

            def evaluate(model, rules=rules, dtype=dtype):
                return [model.with_rule(rule)(*call(rows, dtype)) for rule in rules for rows in (3, 1)]

            held_against(world, ens, evaluate, (kind, dtype), calls=1)


@case
def bits_of_other_results(world):
    """Drawn and assigned rows, variances, members' outputs, rules of a user's, and of the noise level."""

    @fastens.rule
    def logarithmic(scores):
        return scores.exp().mean(0).log()

    by_noise = fastens.rules.NoiseDependentMean(((0.2,) * K, (0.1, 0.2, 0.3, 0.2, 0.2)), (-2.0, 2.0))

    def evaluate(model):
        x, t = call(6)
        found = [model.member_outputs(x, t), *model.forward_with_variance(x, t)]
        found += [model.with_rule(rule)(x, t) for rule in (logarithmic(), by_noise)]
        for rule in ("mixture", "alternating"):
            drawn = model.with_rule(rule)
            with drawn.trajectory(6, 11):
                found += [drawn(x, t), drawn(x, t)]
        with model.assigned([4, 0, 0, 3, 4, 1]):
            found.append(model(x, t))
        return found

    for kind in (Convolutional, OfTorch, Reading):
        options = {"prediction": "epsilon", "schedule": fastens.schedules.VP()}
        held_against(world, fastens.Ensemble(members_of(kind), **options), evaluate, kind)


@case
def bits_where_each_rank_has_a_member(world):
    """A rank's members have no others beside them: their Python may read what has one value there."""
    for kind in (Reading, Convolutional):
        ens = fastens.Ensemble(members_of(kind, count=max(world, 2)))
        held_against(world, ens, lambda model: [model(*call(3))], kind)


@case
def bits_of_members_of_different_structure(world):
    members = [*members_of(OfTorch, count=3), *members_of(Deeper, count=2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ens = fastens.Ensemble(members, "median")

    def evaluate(model):
        x, t = call(4)
        with model.assigned([4, 3, 2, 0]):
            assigned = model(x, t)
        return [model(x, t), assigned]

    held_against(world, ens, evaluate)


@case
def bits_of_dropout_masks(world):
    class Net(OfTorch):
        def __init__(self):
            super().__init__()
            self.layers.insert(1, nn.Dropout(0.3))

    class Planned(Convolutional):
        def __init__(self):
            super().__init__()
            self.last = nn.Sequential(nn.Dropout(0.3), self.last)

    for kind in (Net, Planned):
        for masks in ("fixed", "fresh"):
            ens = fastens.MCDropout(randomised(kind, 0), K, masks=masks, seed=3)

            def evaluate(model):
                with model.trajectory(4, 5):
                    return [model(*call(4)), model(*call(4))]

            held_against(world, ens, evaluate, (kind, masks))


@case
def bits_of_a_rank_without_a_plan(world):
    """As where a plan's check fails on one: the others take none either."""
    ens, none = (fastens.Ensemble(members_of(Convolutional)) for _ in range(2))
    none._engine.plans.can_plan = lambda _: False
    with torch.no_grad(), fastens.deterministic():
        planned, by_torch = ens(*call(3)), none(*call(3))
        assert not torch.equal(planned, by_torch)
        for mesh in meshes(world):
            spread = fastens.distribute(ens, mesh, timeout=60)
            same(spread(*call(3)), planned)
            if mesh.get_rank() == world - 1:
                spread._engine.plans.can_plan = lambda _: False
            for rows in (3, 3, 1):
                same(spread(*call(rows)), none(*call(rows)))


@case
def bits_of_gradients_and_likelihoods(world):
    from fastens.evaluation.denoiser import Denoiser
    from fastens.evaluation.likelihood import likelihood

    def gradient(model):
        with torch.enable_grad():
            x, t = call(3)
            x.requires_grad_()
            return torch.autograd.grad(model(x, t).square().sum(), x)[0]

    def evaluate(model):
        denoiser = Denoiser(model, fastens.schedules.VP())
        data, options = call(2)[0].clamp(-1, 1), dict(levels=None, dequantisation="none", method="euler", steps=2)
        rows = torch.from_numpy(likelihood(denoiser, data, **options).rows)
        return [gradient(model), *(gradient(model.with_rule(rule)) for rule in ("median", "geometric")), rows]

    held_against(world, fastens.Ensemble(members_of(Convolutional), prediction="epsilon"), evaluate)
    net = nn.Sequential(nn.Linear(5, 37), nn.Dropout(0.3), nn.SiLU(), nn.Linear(37, 5))
    masked = fastens.MCDropout(randomised(lambda: net, 0), K, masks="fixed", seed=3)

    def of_masks(model):
        with torch.enable_grad():
            x = batch(3, 5).requires_grad_()
            return [torch.autograd.grad(model(x).square().sum(), x)[0]]

    held_against(world, masked, of_masks, "masks")
