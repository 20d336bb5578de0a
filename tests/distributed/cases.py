"""What every rank does, each case by name: an ensemble over a mesh against the one in this process."""

import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import fastens
from fastens.distributed.slices import wire_bytes
from tests.distributed.networks import Convolutional
from tests.networks import mlp, randomised, small_unet

K = 5
CASES = {}
OF_SEVERAL = set()  # names of cases that one rank alone has not
RULES = [
    "mean",
    "sum",
    "median",
    fastens.rules.Median("lower"),
    "geometric",
    fastens.rules.Geometric("batch"),
    "dominant",
    "max_abs",
    fastens.rules.Mean((0.5, 0.0, 0.25, 0.125, 0.125)),
    fastens.rules.Product((1.0, -0.5, 0.25, 0.0, 1.0)),
]


@fastens.rule
def batch_centred(scores):
    """A rule of a user's that looks at other rows."""
    return scores.mean(0) - scores.mean((0, 1))


def case(function):
    CASES[function.__name__] = function
    return function


def case_of_several(function):
    OF_SEVERAL.add(function.__name__)
    return case(function)


def meshes(world):
    shapes = [(world, 1), (1, world)] + ([(2, 2)] if world == 4 else [])
    return [init_device_mesh("cpu", shape, mesh_dim_names=("member", "data")) for shape in shapes]


def nets(k=K, make=mlp):
    return [randomised(make, seed) for seed in range(k)]


def batch(rows, *shape, seed=0):
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(seed))


def close(a, b, tolerance=2e-6):
    assert a.shape == b.shape, (a.shape, b.shape)
    assert torch.equal(a.isnan(), b.isnan())
    error = (a - b).nan_to_num().abs().max() / b.nan_to_num().abs().max().clamp(min=1e-9)
    assert error <= tolerance, float(error)


@case
def rules_are_the_single_process_ones(world):
    ens = fastens.Ensemble(nets(), prediction="epsilon")
    for mesh in meshes(world):
        spread = fastens.distribute(ens, mesh, timeout=60)
        with torch.no_grad():
            for rule in [*RULES, batch_centred()]:
                ens.rule = spread.rule = rule
                for rows in (7, 1, 3):
                    x = batch(rows, 5, seed=rows)
                    close(spread(x), ens(x))


@case_of_several
def a_network_with_times_and_variance(world):
    ens = fastens.Ensemble(nets(3, small_unet))
    for mesh in meshes(world)[-1:]:
        spread = fastens.distribute(ens, mesh, timeout=60)
        x, t = batch(5, 1, 8, 8), torch.arange(5) + 3
        with torch.no_grad():
            for rule in ("mean", "median"):
                ens.rule = spread.rule = rule
                (a, v), (b, w) = spread.forward_with_variance(x, t), ens.forward_with_variance(x, t)
                close(a.sample, b.sample, 1e-5)
                close(v, w, 1e-4)
                close(spread(x, 7, return_dict=False)[0], ens(x, 7, return_dict=False)[0], 1e-5)
            close(spread.member_outputs(x, t), ens.member_outputs(x, t), 1e-5)
        assert type(spread.config) is type(ens.config)


@case
def rules_in_another_parameterisation(world):
    schedule = fastens.schedules.VP()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 4)

        def forward(self, x, t):
            return self.net(x) + t.view(-1, 1)

    options = {"prediction": "epsilon", "schedule": schedule}
    for extra, rule in (
        ({"aggregate_in": "x0"}, "median"),
        ({}, fastens.rules.NoiseDependentMean(((0.5, 0.5, 0), (0, 0.25, 0.75)), (-2.0, 2.0))),
    ):
        ens = fastens.Ensemble(nets(3, Net), rule, **options, **extra)
        for mesh in meshes(world):
            spread = fastens.distribute(ens, mesh, timeout=60)
            for rows in (6, 1):
                with torch.no_grad():
                    x, t = batch(rows, 4), torch.linspace(0.2, 0.8, rows)
                    close(spread(x, t), ens(x, t), 1e-5)


@case
def drawn_rules(world):
    ens = fastens.Ensemble(nets())
    for mesh in meshes(world):
        spread = fastens.distribute(ens, mesh, timeout=60)
        x = batch(6, 5)
        with torch.no_grad():
            for rule in ("mixture", "alternating"):
                ens.rule = spread.rule = rule
                with ens.trajectory(6, 11):
                    wanted = [ens(x), ens(x)]
                with spread.trajectory(6, 11):
                    found = [spread(x), spread(x)]
                for a, b in zip(found, wanted, strict=True):
                    close(a, b)
            torch.manual_seed(dist.get_rank())  # outside a trajectory the first rank draws for all
            out = spread(x)
            every = [torch.empty_like(out) for _ in range(world)]
            dist.all_gather(every, out)
            assert all(torch.equal(each, out) for each in every)


@case
def assigned_rows(world):
    ens = fastens.Ensemble(nets())
    for mesh in meshes(world):
        spread = fastens.distribute(ens, mesh, timeout=60)
        x = batch(6, 5)
        with torch.no_grad():
            for members in ([4, 0, 0, 3, 4, 1], [2] * 6):
                with ens.assigned(members), spread.assigned(members):
                    close(spread(x), ens(x))
                    close(spread(x.repeat(2, 1)), ens(x.repeat(2, 1)))
            with ens.assigned(per_member=2), spread.assigned(per_member=2):
                close(spread(batch(10, 5)), ens(batch(10, 5)))


@case
def dropout_masks(world):
    def make():
        return nn.Sequential(nn.Linear(5, 16), nn.Dropout(0.5), nn.SiLU(), nn.Linear(16, 5))

    net = randomised(make, 0)
    for masks in ("fixed", "fresh"):
        ens = fastens.MCDropout(net, K, masks=masks, seed=3)
        for mesh in meshes(world):
            spread = fastens.distribute(ens, mesh, timeout=60)
            x = batch(6, 5)
            with torch.no_grad():
                for rule in ("mean", "median", "mixture"):
                    ens.rule = spread.rule = rule
                    with ens.trajectory(6, 5):
                        wanted = ens(x), ens(x)
                    with spread.trajectory(6, 5):
                        found = spread(x), spread(x)
                    for a, b in zip(found, wanted, strict=True):
                        close(a, b)
    assert not torch.equal(*wanted) or masks == "fixed"


@case
def members_of_different_structure(world):
    members = [*nets(3), *nets(2, lambda: nn.Sequential(nn.Linear(5, 5), nn.SiLU()))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ens = fastens.Ensemble(members, "median")
        for mesh in meshes(world):
            spread = fastens.distribute(ens, mesh, timeout=60)
            with torch.no_grad():
                close(spread(batch(4, 5)), ens(batch(4, 5)))
                with ens.assigned([4, 3, 2, 0]), spread.assigned([4, 3, 2, 0]):
                    close(spread(batch(4, 5)), ens(batch(4, 5)))


@case
def arguments_of_each_member(world):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(5, 5)

        def forward(self, x, c):
            return self.net(x) * c

    ens = fastens.Ensemble(nets(K, Net))
    own = fastens.PerMember([float(k) for k in range(K)])
    for mesh in meshes(world):
        spread = fastens.distribute(ens, mesh, timeout=60)
        with torch.no_grad():
            close(spread(batch(4, 5), own), ens(batch(4, 5), own))


@case
def gradients(world):
    ens = fastens.Ensemble(nets())
    for mesh in meshes(world):
        spread = fastens.distribute(ens, mesh, timeout=60)
        for rule in ("mean", "median", "geometric"):
            ens.rule = spread.rule = rule
            got = []
            for model in (spread, ens):
                x = batch(4, 5).requires_grad_()
                got.append(torch.autograd.grad(model(x).square().sum() + x.sum(), x)[0])
            close(*got, 1e-5)


@case
def likelihood(world):
    from fastens.evaluation.denoiser import Denoiser
    from fastens.evaluation.likelihood import likelihood

    ens = fastens.Ensemble(nets(3, Convolutional), prediction="epsilon")
    schedule = fastens.schedules.VP()
    data = batch(3, 2, 4, 4).clamp(-1, 1)
    options = dict(levels=None, dequantisation="none", method="euler", steps=3)
    for mesh in meshes(world)[:1]:
        spread = fastens.distribute(ens, mesh, timeout=60)
        for rule in ("mean", "geometric"):
            ens.rule = spread.rule = rule
            a, b = (likelihood(Denoiser(model, schedule), data, **options).rows for model in (spread, ens))
            close(torch.from_numpy(a), torch.from_numpy(b), 1e-4)


@case
def batches_of_each_rank(world):
    ens = fastens.Ensemble(nets(), "median")
    for mesh in meshes(world):
        spread = fastens.distribute(ens, mesh, batch="local", timeout=60)
        place = mesh.get_local_rank("data")
        with torch.no_grad():
            for call in range(1 + place):  # as many and as large as each likes
                x = batch(1 + 2 * place, 5, seed=10 * place + call)
                close(spread(x), ens(x))


@case
def members_are_read_by_the_rank_that_holds_them(world):
    members = nets()
    for member in members:
        member.register_buffer("constant", torch.ones(3))
        member.register_buffer("own", torch.randn(3))
    members[0].own.zero_()

    class Lazy:
        read = 0

        def __len__(self):
            return K

        def __getitem__(self, k):
            found = members[k]
            Lazy.read += len(found) if isinstance(k, slice) else 1
            return found

    ens = fastens.Ensemble(members, "median")
    for mesh in meshes(world):
        Lazy.read = 0
        spread = fastens.distribute(Lazy(), mesh, rule="median", timeout=60)
        assert Lazy.read <= -(-K // mesh.size(0))
        assert spread._engine.shared == ens._engine.shared
        with torch.no_grad():
            close(spread(batch(4, 5)), ens(batch(4, 5)))


@case
def states_are_cut_anew(world):
    import tempfile

    import torch.distributed.checkpoint as dcp

    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    ens, other = fastens.Ensemble(nets()), fastens.Ensemble(nets(2 * K)[K:])
    first, *more = meshes(world)
    spread = fastens.distribute(ens, first, timeout=60)
    dcp.save(spread.state_dict(), checkpoint_id=folder[0])
    x = batch(4, 5)
    with torch.no_grad():
        wanted = ens(x)
        for mesh in more:  # members over other ranks
            again = fastens.distribute(other, mesh, timeout=60)
            assert not torch.allclose(again(x), wanted)
            state = again.state_dict()
            dcp.load(state, checkpoint_id=folder[0])
            again.load_state_dict(state)
            close(again(x), wanted)
        again = fastens.distribute(other, first, timeout=60)
        again.load_state_dict(ens.state_dict())  # whole stacks
        close(again(x), wanted)
        state = other.state_dict()  # one process
        dcp.load(state, checkpoint_id=folder[0], no_dist=True)
        other.load_state_dict(state)
        assert torch.equal(other(x), wanted)


@case
def bits_do_not_depend_on_the_mesh_where_members_are_sent(world):
    """All but partial sums: each rank reduces what it has of all members, in their order."""
    ens = fastens.Ensemble(nets())
    outputs = ens.member_outputs(batch(6, 5)).detach()
    for mesh in meshes(world):
        spread = fastens.distribute(ens, mesh, timeout=60)
        share = spread._share
        spread._held = lambda _, share=share: [outputs[share.slice], torch.utils._pytree.tree_structure(0)]
        with torch.no_grad():
            for rule in ("median", "geometric", "dominant", "max_abs"):
                ens.rule = spread.rule = rule
                if mesh.size(1) == 1:
                    assert torch.equal(spread(batch(6, 5)), fastens.aggregate(outputs, rule)), rule


@case
def bytes_sent_are_the_formulas(world):
    ens = fastens.Ensemble(nets(6))
    (mesh, *_) = meshes(world)
    spread = fastens.distribute(ens, mesh, timeout=60)
    exchange = spread._place.members
    for rule, partial in (("mean", True), ("median", False)):
        spread.rule = rule
        before = exchange.sent
        with torch.no_grad():
            spread(batch(7, 5))
        most = -(-6 // world) * 4 > 4
        assert exchange.sent - before == wire_bytes((7, 5), 4, 6, world, partial and most)[exchange.rank]
    for rule, smallest in (("median", 0), ("geometric", 4 * (world - 1))):  # one row, cut by elements
        spread.rule = rule
        before = exchange.sent
        with torch.no_grad():
            spread(batch(1, 5))
        wanted = wire_bytes((5,), 4, 6, world, False)[exchange.rank] + smallest
        assert exchange.sent - before == (wanted if world > 1 else 0)


@case
def samplers_call_it(world):
    from diffusers import DDIMPipeline, DDIMScheduler

    ens = fastens.Ensemble(nets(3, small_unet))
    images = []
    for mesh in meshes(world)[:1]:
        for model in (fastens.distribute(ens, mesh, timeout=60), ens):
            pipe = DDIMPipeline(model, DDIMScheduler(num_train_timesteps=100)).to("cpu")
            pipe.set_progress_bar_config(disable=True)
            run = pipe(3, torch.Generator().manual_seed(1), num_inference_steps=3, output_type="np")
            images.append(torch.from_numpy(run.images))
            assert type(pipe.unet) is type(model)
    close(*images, 1e-5)


@case
def whole_runs_of_each_member(world):
    ens = fastens.Ensemble(nets())
    for mesh in meshes(world)[:1]:
        spread = fastens.distribute(ens, mesh, timeout=60)

        def sampler(num, generator=None, model=None):
            x = torch.randn(num, 5, generator=generator)
            for _ in range(2):
                x = x - 0.1 * model(x)
            return x

        found = [
            fastens.sample_members(sampler, None, 2, ensemble=model, generator=3, model=model)
            for model in (spread, ens)
        ]
        close(*found, 1e-5)
