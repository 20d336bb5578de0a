"""The ensemble as its users meet it."""

import copy
import inspect
import pickle
import warnings

import pytest
import torch
from torch import nn

import fastens
from tests.networks import NETWORKS, EDMLike, mlp, randomised, small_unet, tensor_of
from tests.tolerances import NETWORK, relative_error


def small(seed=0):
    return randomised(mlp, seed)


@pytest.fixture
def members():
    return [small(seed) for seed in range(3)]


@pytest.fixture
def x():
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(0))


def state(member):
    return {name: tensor.clone() for name, tensor in member.state_dict().items()}


def test_members_come_out_untouched(members, x):
    before = [state(member) for member in members]
    grads = [[p.requires_grad for p in member.parameters()] for member in members]
    ensemble = fastens.Ensemble(members)
    ensemble(x).sum().backward()
    with torch.no_grad():
        for p in ensemble.parameters():
            p.add_(1)
    for member, old, flags in zip(members, before, grads, strict=True):
        assert all(torch.equal(old[name], tensor) for name, tensor in member.state_dict().items())
        assert all(p.grad is None for p in member.parameters())
        assert [p.requires_grad for p in member.parameters()] == flags
        assert type(member[0]) is nn.Linear


@pytest.mark.parametrize(
    "rule", ["mean", "sum", "median", "geometric", "dominant", "max_abs", fastens.rules.Mean([0.5, 0.2, 0.3])]
)
@pytest.mark.parametrize("engine", ["fold", "loop"])
def test_rules_apply_to_the_member_outputs(members, x, rule, engine):
    ensemble = fastens.Ensemble(members, rule, engine=engine)
    with torch.no_grad():
        expected = fastens.aggregate(torch.stack([member(x) for member in members]), rule, backend="reference")
        assert relative_error(ensemble(x), expected) < 1e-4


def test_variance_is_over_members(members, x):
    with torch.no_grad():
        stack = torch.stack([member(x) for member in members])
        mean, variance = fastens.Ensemble(members).forward_with_variance(x)
    assert relative_error(mean, stack.mean(0)) < NETWORK[torch.float32]
    assert relative_error(variance, stack.var(0, correction=0)) < 1e-4


def test_output_is_the_callers(members, x):
    ensemble = fastens.Ensemble(members)
    with torch.no_grad():
        first = ensemble(x)
        kept = first.clone()
        first.zero_()
        assert torch.equal(ensemble(x), kept)


def test_different_members_take_the_loop_and_say_so(x):
    members = [small(), nn.Sequential(nn.Linear(5, 5)).eval()]
    with pytest.raises(ValueError, match="member 1 differs from member 0 at"):
        fastens.Ensemble(members, engine="fold")
    with pytest.warns(UserWarning, match="one by one"):
        ensemble = fastens.Ensemble(members)
    assert ensemble.engine == "loop"
    with torch.no_grad():
        assert relative_error(ensemble(x), (members[0](x) + members[1](x)) / 2) < 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastens.Ensemble(members, engine="loop")


def test_settings_count_as_structure():
    a, b = (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4, eps=eps)) for eps in (1e-5, 1e-2))
    with pytest.raises(ValueError, match=r"1\.eps: 1e-05 against 0\.01"):
        fastens.Ensemble([a, b], engine="fold")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fastens.Ensemble([]), ValueError, "members is empty"),
        (lambda: fastens.Ensemble(small()), (TypeError, ValueError), "sequence"),
        (lambda: fastens.Ensemble([3]), TypeError, "member 0 is a int"),
        (lambda: fastens.Ensemble([small(), None]), TypeError, "member 1 is a NoneType"),
        (lambda: fastens.Ensemble([small(), "path"]), TypeError, "member 1 is a str, but member 0 a Sequential"),
        (lambda: fastens.Ensemble(small() for _ in range(2)), TypeError, "members is a generator"),
        (lambda: fastens.Ensemble("path"), TypeError, "members is one path"),
        (lambda: fastens.Ensemble([small()], "maen"), ValueError, "'mean'"),
        (lambda: fastens.Ensemble([small()], engine="vmap"), ValueError, "engine 'vmap'"),
        (lambda: fastens.Ensemble([small()], backend="cuda"), ValueError, "backend 'cuda'"),
        (lambda: fastens.Ensemble([small()], max_fold=0), ValueError, "max_fold"),
        (lambda: fastens.Ensemble([small()], fastens.rules.Mean([0.5, 0.5])), ValueError, "2 weights"),
        (lambda: fastens.Ensemble([small(), small().double()]), ValueError, "member 1: 0.weight is torch.float64"),
        (lambda: fastens.Ensemble([small(), small().to("meta")]), ValueError, "member 1: 0.weight is on meta"),
        (lambda: fastens.Ensemble([small()], prediction="epsilon", aggregate_in="x0"), ValueError, "aggregate_in"),
    ],
)
def test_bad_input_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_looks_like_a_member():
    ensemble = fastens.Ensemble([randomised(small_unet, seed) for seed in range(2)])
    member = small_unet()
    assert ensemble.config.sample_size == member.config.sample_size
    assert inspect.signature(ensemble.forward).parameters.keys() == inspect.signature(member.forward).parameters.keys()
    assert ensemble.dtype == torch.float32
    assert ensemble.device.type == "cpu"
    with pytest.raises(AttributeError, match="nonsense"):
        _ = ensemble.nonsense


def test_members_on_demand_are_copies(members, x):
    ensemble = fastens.Ensemble(members)
    member = ensemble.members[1]
    with torch.no_grad():
        assert torch.equal(member(x), members[1](x))
        expected = ensemble(x)
        member[0].weight.zero_()
        assert torch.equal(ensemble(x), expected)
    assert len(ensemble.members) == 3
    with pytest.raises(IndexError):
        _ = ensemble.members[3]


@pytest.mark.parametrize("name", ["mlp", "unet_2d", "gru", "edm_like"])
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state_dict"])
def test_copies_compute_the_same(name, way):
    if (name, way) == ("edm_like", "pickle"):
        name = "gru_time_first"  # torch refuses to pickle parametrized modules, the member itself included
    make, arguments = NETWORKS[name]
    args, kwargs = arguments(2)
    ensemble = fastens.Ensemble([randomised(make, seed) for seed in range(2)], "median")
    if way == "deepcopy":
        other = copy.deepcopy(ensemble)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(ensemble))
    else:
        other = fastens.Ensemble([randomised(make, seed + 7) for seed in range(2)], "median")
        other.load_state_dict(ensemble.state_dict())
    with torch.no_grad():
        assert torch.equal(tensor_of(other(*args, **kwargs)), tensor_of(ensemble(*args, **kwargs)))
    assert other.rule == ensemble.rule


def test_moves_to_another_dtype(members, x):
    ensemble = fastens.Ensemble(members).to(torch.float64)
    with torch.no_grad():
        expected = torch.stack([copy.deepcopy(member).double()(x.double()) for member in members]).mean(0)
        assert relative_error(ensemble(x.double()), expected) < NETWORK[torch.float64]


@pytest.mark.parametrize("name", ["unet_2d_attention", "dit", "transformer", "vision_blocks"])
def test_moves_as_its_members_do(name):
    make, arguments = NETWORKS[name]
    members = [randomised(make, seed) for seed in range(2)]
    ensemble = fastens.Ensemble(members)
    args, kwargs = arguments(2)
    with torch.no_grad():
        ensemble(*args, **kwargs)
        assert ensemble.to("cpu", torch.float64) is ensemble
        assert ensemble.dtype == torch.float64
        args = [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in args]
        expected = torch.stack([tensor_of(member.double()(*args, **kwargs)) for member in members]).mean(0)
        assert relative_error(tensor_of(ensemble(*args, **kwargs)), expected) < NETWORK[torch.float64]
    assert ensemble.engine == "fold"
    assert {p.device.type for p in ensemble.to("meta").parameters()} == {"meta"}


def test_train_and_eval_reach_the_members(x):
    members = [nn.Sequential(nn.Linear(5, 64), nn.Dropout(0.5)).train() for _ in range(2)]
    ensemble = fastens.Ensemble(members)
    assert ensemble.training
    assert (ensemble(x) == 0).any()
    ensemble.eval()
    assert not (ensemble(x) == 0).any()


class Swapped(nn.Module):
    """The batch is compared with itself: no folded batch can do that."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(5, 5)

    def forward(self, x):
        return self.inner(x) - x.mean(0)


class Ordered(Swapped):
    def forward(self, x):
        return self.inner(x) * torch.arange(len(x))[:, None]


class Reading(Swapped):
    def forward(self, x):
        return self.inner(x) * float(self.inner.weight.detach().sum())


@pytest.mark.parametrize("network", [Swapped, Ordered])
def test_members_may_mix_and_count_their_rows(network):
    members = [randomised(network, seed) for seed in range(2)]
    ensemble = fastens.Ensemble(members, engine="fold")
    with torch.no_grad():
        for x in (torch.randn(4, 5), torch.randn(3, 5)):
            assert relative_error(ensemble(x), (members[0](x) + members[1](x)) / 2) < 1e-6
    assert ensemble.engine == "fold"


def test_a_network_that_reads_its_weights_is_looped():
    members = [randomised(Reading, seed) for seed in range(2)]
    ensemble, x = fastens.Ensemble(members), torch.randn(4, 5)
    with torch.no_grad(), pytest.warns(UserWarning, match="has no one answer"):
        output = ensemble(x)
    assert ensemble.engine == "loop"
    with torch.no_grad():
        assert relative_error(output, (members[0](x) + members[1](x)) / 2) < 1e-6


class Masked(nn.Module):
    """A table that may be as long as the batch without carrying it."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x, mask):
        return torch.einsum("bnd,nm->bmd", self.inner(x), mask)


def test_a_table_as_long_as_the_batch_is_left_alone():
    members = [randomised(Masked, seed) for seed in range(2)]
    x, mask = torch.randn(3, 3, 4), torch.rand(3, 3)
    ensemble = fastens.Ensemble(members)
    with torch.no_grad():
        output = ensemble(x, mask)
        assert relative_error(output, (members[0](x, mask) + members[1](x, mask)) / 2) < 1e-6
    assert ensemble.engine == "fold"


def test_nan_reaches_the_output(members, x):
    x[1, 2] = torch.nan
    for rule in ("mean", "median", "dominant", "geometric", "max_abs"):
        with torch.no_grad():
            output = fastens.Ensemble(members, rule)(x)
        assert output[1].isnan().all()
        assert not output[0].isnan().any()


def test_trajectory(members, x):
    ensemble = fastens.Ensemble(members, "mixture")
    with pytest.raises(RuntimeError, match="trajectory"):
        ensemble(x)
    with torch.no_grad(), ensemble.trajectory(4, torch.Generator().manual_seed(0)):
        guided = ensemble(torch.cat([x, x]))
        assert torch.equal(guided[:4], guided[4:])
        assert relative_error(ensemble(x), guided[:4]) < NETWORK[torch.float32]
        with pytest.raises(RuntimeError, match="already in progress"), ensemble.trajectory(4):
            pass
        with pytest.raises(ValueError, match="multiple"):
            ensemble(x[:3])
    with torch.no_grad(), ensemble.trajectory(4, torch.Generator().manual_seed(0)):
        assert relative_error(ensemble(x), guided[:4]) < NETWORK[torch.float32]
    ensemble.rule = "alternating"
    with torch.no_grad(), ensemble.trajectory(4, torch.Generator().manual_seed(0)):
        assert len({tuple(ensemble(x).flatten().tolist()) for _ in range(5)}) > 1


def test_registers_a_layer():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(5))

        def forward(self, x):
            return x * self.scale

    class FoldedScale(fastens.network.registry.FoldedLayer):
        def fold_forward(self, x, offsets, /):
            return x * fastens.reference._rows.expand_rows(self.stack("scale"), len(x), offsets)

    fastens.register_layer(Scale, FoldedScale)
    members = [randomised(lambda: nn.Sequential(Scale(), nn.Linear(5, 5)), seed) for seed in range(2)]
    ensemble = fastens.Ensemble(members)
    x = torch.randn(3, 5)
    with torch.no_grad():
        assert relative_error(ensemble(x), (members[0](x) + members[1](x)) / 2) < 1e-6
    assert [layer.how for layer in ensemble.report().layers] == ["folded", "folded"]
    with pytest.raises(TypeError, match="not a subclass"):
        fastens.register_layer(Scale, Scale)


def test_batch_norm_in_training_keeps_statistics_per_member():
    members = [randomised(lambda: nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)), seed) for seed in range(2)]
    x = torch.randn(4, 2, 5, 5)
    ensemble = fastens.Ensemble(members).train()
    twins = [copy.deepcopy(member).train() for member in members]
    expected = torch.stack([twin(x) for twin in twins])
    with torch.no_grad():
        outputs = ensemble.member_outputs(x)
    assert relative_error(outputs, expected.detach()) < 1e-5


def test_report_prints(members, x):
    ensemble = fastens.Ensemble([randomised(EDMLike, seed) for seed in range(2)])
    text = str(ensemble.report())
    assert "engine fold, 2 members" in text
    assert "resample_filter" not in text
    assert {"folded"} <= {layer.how for layer in ensemble.report().layers}


def test_members_in_channels_last_stay_so(tmp_path):
    torch.manual_seed(0)
    members = [nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 2, 3)) for _ in range(3)]
    x = torch.randn(2, 3, 9, 8)
    with torch.no_grad():
        expected = torch.stack([member(x) for member in members]).mean(0)
        ens = fastens.Ensemble([member.to(memory_format=torch.channels_last) for member in members]).eval()
        weight = dict(ens.named_parameters())["network.0.weight"]
        assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in weight)
        assert all(torch.equal(kernel, member[0].weight) for kernel, member in zip(weight, members, strict=True))
        for form in (torch.contiguous_format, torch.channels_last):
            torch.testing.assert_close(ens(x.contiguous(memory_format=form)), expected)
        assert ens.verify(x) < 1e-5
        ens.save_pretrained(tmp_path)
        again = fastens.Ensemble.from_pretrained(tmp_path, factory=lambda: members[0])
        torch.testing.assert_close(again.eval()(x), expected)
    copy.deepcopy(ens)(x).sum().backward()


@pytest.mark.parametrize("engine", ["fold", "loop"])
def test_a_memory_format_is_that_of_each_members_kernels(engine):
    class Flat(nn.Module):
        """Kernels of one dimension beside those of two: a stack of them has four dimensions, and is no image."""

        def __init__(self):
            super().__init__()
            self.image, self.line = nn.Conv2d(3, 8, 3), nn.Conv1d(8, 2, 3)

        def forward(self, x):
            return self.line(self.image(x).flatten(2))

    members = [randomised(Flat, seed) for seed in range(3)]
    x = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = torch.stack([member(x) for member in members]).mean(0)
        ens = fastens.Ensemble(members, engine=engine).eval()
        for memory_format in (torch.channels_last, torch.contiguous_format):
            assert ens.to(memory_format=memory_format) is ens
            for member in ens.members:
                assert member.image.weight.is_contiguous(memory_format=memory_format)
                assert member.line.weight.is_contiguous()
            torch.testing.assert_close(ens(x), expected)
    assert ens.to(torch.float64, memory_format=torch.channels_last).dtype is torch.float64


def test_a_wider_output_is_held_to_the_precision_of_the_weights():
    """Times in float64, as samplers count, make a float64 output of float32 arithmetic."""

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = randomised(mlp, int(torch.initial_seed()))

        def forward(self, x, t):
            return self.inner(x).double() * t

    members = []
    for seed in range(3):
        torch.manual_seed(seed)
        members.append(Wide().eval())
    x, t = torch.randn(4, 5), torch.tensor(0.7, dtype=torch.float64)
    ens = fastens.Ensemble(members)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert relative_error(ens(x, t), torch.stack([m(x, t) for m in members]).mean(0)) < NETWORK[torch.float32]
    assert ens.engine == "fold"
