"""A frozen ensemble on a GPU runs launches of the same recording: here on the CPU, where a switch asks for them."""

import pytest
import torch

import fastens
from fastens import _native, capture
from fastens.device import device_of
from fastens.engine import planned
from tests.fold.test_plans import DRAWS, follow_the_members, members_of, scaled
from tests.networks import NETWORKS, randomised, tensor_of
from tests.ops.cases import interpreted
from tests.tolerances import NETWORK, relative_error

HALF = {torch.bfloat16: 3e-2, torch.float16: 4e-3}  # of a network whose layers round to 8 or 11 bits


@pytest.fixture(autouse=True)
def _launches(monkeypatch):
    monkeypatch.setattr(planned, "launches_on", lambda _: True)


@pytest.mark.parametrize("name", NETWORKS)
def test_launches_give_what_the_members_and_programs_give(name, monkeypatch):
    members, arguments = members_of(name)
    ensemble = fastens.Ensemble(members, engine="fold")
    for batch in (1, 3):
        for factor in (1.0, 0.7, -1.3):  # checked and planned, planned, planned
            args, kwargs = scaled(arguments(batch), factor)
            with torch.no_grad():
                expected = torch.stack([tensor_of(member(*args, **kwargs)) for member in members])
                outputs = tensor_of_stack(ensemble.member_outputs(*args, **kwargs))
                mean = tensor_of(ensemble(*args, **kwargs))
            assert relative_error(outputs, expected) < NETWORK[torch.float32]
            assert relative_error(mean, expected.mean(0)) < NETWORK[torch.float32]
    assert len(ensemble.report().plans) > 0, ensemble.report().why_no_plan
    if _native.load():
        monkeypatch.setattr(planned, "launches_on", lambda _: False)
        with torch.no_grad():
            native = tensor_of_stack(fastens.Ensemble(members, engine="fold").member_outputs(*args, **kwargs))
        assert relative_error(outputs, native) < NETWORK[torch.float32]


def tensor_of_stack(output):
    return output[0] if isinstance(output, tuple) else output


def launched_unet(name="unet_2d", **settings):
    members, arguments = members_of(name, 2)
    ensemble = fastens.Ensemble(members, **settings)
    args, _ = arguments(2)
    with torch.no_grad():
        ensemble(*args)
    assert ensemble.report().plans, ensemble.report().why_no_plan
    return ensemble, args


def plan_of(ensemble):
    (plan,) = [entry.plan for entry in ensemble._engine.plans.entries]
    return plan


def test_a_residual_block_is_two_convolutions_and_nothing_between():
    ensemble, _ = launched_unet()
    (kinds,) = ensemble.report().plans
    blocks, shortcuts, ends, resampling = 8, 5, 2, 2  # shortcuts: of blocks that change how many channels there are
    assert kinds["conv2d"] == 2 * blocks + shortcuts + ends + resampling
    assert kinds["linear group"] == 1  # the embedding, for all blocks
    assert kinds["linear"] == 2
    assert not {"moments", "group norm", "aten.silu.default", "aten.add.Tensor"} & set(kinds)
    assert kinds.get("join", 0) <= 1  # of what is enlarged
    assert f"{kinds['conv2d']} conv2d" in str(ensemble.report())
    assert "plans run on" not in str(ensemble.report())


def test_the_last_layer_sums_under_a_mean(monkeypatch):
    monkeypatch.setenv("FASTENS_AUDIT", "off")
    ensemble, args = launched_unet()
    plan, calls = plan_of(ensemble), []
    assert plan.sums
    run = type(plan).run
    monkeypatch.setattr(type(plan), "run", lambda self, x, weights=None: calls.append(weights) or run(self, x, weights))
    with torch.no_grad():
        stack = ensemble.member_outputs(*args)
        assert relative_error(ensemble(*args).sample, stack.mean(0)) < NETWORK[torch.float32]
        ensemble.rule = fastens.rules.Mean([0.25, 0.75])
        wanted = 0.25 * stack[0] + 0.75 * stack[1]
        assert relative_error(ensemble(*args).sample, wanted) < NETWORK[torch.float32]
        ensemble.rule = "median"
        assert relative_error(ensemble(*args).sample, stack.median(0).values) > 0
        _, variance = ensemble.forward_with_variance(*args)
        assert relative_error(variance, stack.var(0, correction=0)) < 1e-4
    assert calls == [None, [0.5, 0.5], [0.25, 0.75], None, None]


@pytest.mark.parametrize("name", ["dit", "mlp", "edm_like"])
def test_other_ends_are_added_up(name):
    members, arguments = members_of(name, 2)
    ensemble = fastens.Ensemble(members, engine="fold")
    args, kwargs = arguments(2)
    with torch.no_grad():
        ensemble(*args, **kwargs)
    assert not plan_of(ensemble).sums or name == "edm_like"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_networks_of_half_precision_hold_it(dtype):
    members = [member.to(dtype) for member in members_of("unet_2d", 2)[0]]
    ensemble = fastens.Ensemble(members)
    x, t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(7)
    with torch.no_grad():
        outputs = ensemble.member_outputs(x.to(dtype), t)
        expected = torch.stack([member.float()(x.to(dtype).float(), t).sample for member in members])
    assert ensemble.report().plans, ensemble.report().why_no_plan
    assert outputs.dtype == dtype
    assert relative_error(outputs, expected) < HALF[dtype]
    images = [launch.out for launch in plan_of(ensemble)._launches if launch.name == "conv2d"]
    assert {image.where.dtype for image in images} == {dtype}


def test_results_are_the_callers():
    ensemble, args = launched_unet()
    for call in (ensemble.member_outputs, lambda *a: ensemble(*a).sample):
        with torch.no_grad():
            first = call(*args)
            kept = first.clone()
            first.fill_(float("nan"))
            assert torch.equal(call(*args), kept)


@pytest.mark.parametrize("change", ["copy_", "load_state_dict", "refresh", "double"])
def test_changed_weights_are_seen(change):
    ensemble, args = launched_unet()
    if change == "copy_":
        with torch.no_grad():
            next(ensemble.parameters()).mul_(1.5)
    elif change == "load_state_dict":
        ensemble.load_state_dict({name: 0.9 * t for name, t in ensemble.state_dict().items()})
    elif change == "refresh":
        next(ensemble.parameters()).data.mul_(2.0)
        ensemble.refresh()
    else:
        ensemble.double()
        args = (args[0].double(), args[1])
    with torch.no_grad():
        loop = torch.stack([member(*args).sample for member in ensemble.members]).mean(0)
        for _ in range(2):
            assert relative_error(ensemble(*args).sample, loop) < NETWORK[torch.float32]


@pytest.mark.parametrize("kind", ["branch", "in place", "number", "float64 table"])
def test_tricky_networks(kind):
    follow_the_members(kind, calls=4)


@pytest.mark.parametrize("name", NETWORKS)
def test_drawn_rows(name, monkeypatch):
    members, arguments = members_of(name)
    ensemble = fastens.Ensemble(members, "alternating", engine="fold")
    args, kwargs = arguments(4)
    with torch.no_grad():
        stack = torch.stack([tensor_of(member(*args, **kwargs)) for member in members])
        for draw in DRAWS:
            drawn = torch.tensor(draw)
            monkeypatch.setattr(ensemble._draws, "members", lambda *_, drawn=drawn: drawn)
            output = tensor_of(ensemble(*args, **kwargs))
            assert relative_error(output, stack[drawn, torch.arange(4)]) < NETWORK[torch.float32]
    assert len(ensemble.report().plans) == 1, ensemble.report().why_no_plan


def test_gradients_read_the_stacks():
    ensemble, args = launched_unet()
    x = args[0].clone().requires_grad_()
    ensemble(x, args[1]).sample.sum().backward()
    assert x.grad is not None


def test_a_recorded_step_holds_the_launches(monkeypatch):
    """What a CUDA graph records is the plan, bound to memory of its own."""
    ensemble, args = launched_unet()
    plan, bound = plan_of(ensemble), []
    monkeypatch.setattr(plan, "_on", device_of("cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    bind = type(plan)._bind
    monkeypatch.setattr(type(plan), "_bind", lambda self: bound.append(bind(self)) or bound[-1])
    monkeypatch.setattr(capture, "record_graph", lambda run, _: (lambda: None, run()))
    with torch.no_grad():
        recorded, _ = capture.record_graph(lambda: ensemble._evaluated(args, {}), None)
        again = ensemble._evaluated(args, {}).sample
    assert recorded is not None
    assert len(bound) == 2
    pointers = {x.data_ptr() for memory in (*bound, plan._bound) for _, x in memory.inputs}
    assert len(pointers) == 3 * len(bound[0].inputs)
    with torch.no_grad():
        loop = torch.stack([member(*args).sample for member in ensemble.members]).mean(0)
    assert relative_error(again, loop) < NETWORK[torch.float32]


def tiny_unet():
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=4,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        attention_head_dim=8,
    )


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, pytest.param(torch.bfloat16, marks=interpreted), pytest.param(torch.float16, marks=interpreted)],
)
def test_the_kernels_themselves(dtype):
    pytest.importorskip("triton")
    members = [randomised(tiny_unet, seed) for seed in range(2)]
    x, t = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0)).to(dtype), torch.tensor(7)
    with torch.no_grad():
        expected = torch.stack([member(x.float(), t).sample for member in members])
        ensemble = fastens.Ensemble([member.to(dtype) for member in members], backend="triton")
        outputs = ensemble.member_outputs(x, t)
        mean = ensemble(x, t).sample
    assert ensemble.report().plans, ensemble.report().why_no_plan
    bound = (NETWORK | HALF)[dtype]
    assert relative_error(outputs, expected) < bound
    assert relative_error(mean, expected.mean(0)) < bound
