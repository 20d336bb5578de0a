"""An ensemble of diffusers models does what diffusers' own tests of a model ask of one: files, attributes, settings."""

import copy
import functools
import json
import logging
from contextlib import ExitStack

import diffusers
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, StateManager

import fastens
from tests.networks import dit, randomised, small_unet, unet_2d_condition
from tests.tolerances import relative_error

INPUTS = {
    "unet": (lambda: small_unet(True), lambda x, t: {"sample": x[:, :1], "timestep": t}),
    "conditional": (
        unet_2d_condition,
        lambda x, t: {"sample": x, "timestep": t, "encoder_hidden_states": x.flatten(1)[:, :60].view(2, 5, 12)},
    ),
    "dit": (dit, lambda x, t: {"hidden_states": x, "timestep": t, "class_labels": torch.tensor([1, 3])}),
}


def members(kind, num_members=3):
    return [randomised(INPUTS[kind][0], seed).eval() for seed in range(num_members)]


def inputs(kind):
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return INPUTS[kind][1](x, torch.tensor([10, 10]))


@torch.no_grad()
def evaluated(model, kind="unet"):
    return model(**inputs(kind), return_dict=False)[0]


def looped(models, kind="unet"):
    return torch.stack([evaluated(model, kind) for model in models]).mean(0)


def assert_same(ensemble, expected):
    ours, theirs = ensemble.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("kind", ["unet", "dit"])
@pytest.mark.parametrize("size", [None, "20KB"])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_files_of_a_variant_and_in_shards(kind, size, variant, tmp_path):
    ensemble = fastens.Ensemble(members(kind))
    ensemble.save_pretrained(tmp_path, variant=variant, max_shard_size=size)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    stem = "diffusion_pytorch_model" + (f".{variant}" if variant else "")
    if size is None:
        assert files == [f"{stem}.safetensors"]
    else:
        index = tmp_path / f"diffusion_pytorch_model.safetensors.index{f'.{variant}' if variant else ''}.json"
        assert set(json.loads(index.read_text())["weight_map"].values()) == set(files)
        assert len(files) > 2
        assert files[-1] == f"{stem}-{len(files):05}-of-{len(files):05}.safetensors"
    again = fastens.Ensemble.from_pretrained(tmp_path, variant=variant)
    assert_same(again, ensemble)
    with pytest.raises(FileNotFoundError, match=r"Error no file named .* in directory .*"):
        fastens.Ensemble.from_pretrained(tmp_path, variant=None if variant else "fp16")


def test_no_file_holds_more_than_was_asked(tmp_path):
    ensemble = fastens.Ensemble(members("unet"))
    ensemble.save_pretrained(tmp_path, max_shard_size=100_000)
    largest = max(stack.nbytes for stack in ensemble.parameters())
    assert all(path.stat().st_size < max(largest, 100_000) + 10_000 for path in tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("sizes", [(None, "20KB"), ("20KB", None), ("20KB", "60KB")], ids=str)
def test_a_save_replaces_the_files_of_the_one_before(sizes, tmp_path):
    first, second = fastens.Ensemble(members("unet")), fastens.Ensemble(members("unet")[1:])
    for ensemble, size in zip((first, second), sizes, strict=True):
        ensemble.save_pretrained(tmp_path, max_shard_size=size)
    assert_same(fastens.Ensemble.from_pretrained(tmp_path), second)
    fresh = tmp_path / "fresh"
    second.save_pretrained(fresh, max_shard_size=sizes[1])
    assert sorted(p.name for p in tmp_path.iterdir() if p != fresh) == sorted(p.name for p in fresh.iterdir())


def test_a_variant_stays_where_another_is_saved(tmp_path):
    ensemble = fastens.Ensemble(members("unet"))
    ensemble.save_pretrained(tmp_path)
    half = fastens.Ensemble(members("unet"), dtype=torch.float16)
    half.save_pretrained(tmp_path, variant="fp16", max_shard_size="20KB")
    assert_same(fastens.Ensemble.from_pretrained(tmp_path), ensemble)
    assert fastens.Ensemble.from_pretrained(tmp_path, variant="fp16").dtype == torch.float16


def test_files_of_two_saves_are_refused(tmp_path):
    ensemble = fastens.Ensemble(members("unet"))
    ensemble.save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "ensemble.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="of an earlier save that was interrupted"):
        fastens.Ensemble.from_pretrained(tmp_path)


def test_a_folder_of_an_earlier_version_is_read(tmp_path):
    ensemble = fastens.Ensemble(members("unet"))
    ensemble.save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").rename(tmp_path / "ensemble.safetensors")
    assert_same(fastens.Ensemble.from_pretrained(tmp_path), ensemble)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "../fp16"}, "a part of a file's name"),
        ({"max_shard_size": "much"}, "expected a number of bytes"),
        ({"max_shard_size": 0}, "expected a number of bytes"),
        ({"safe_serialization": False}, "written as safetensors"),
        ({"push_to_hub": True}, "hf upload"),
    ],
)
def test_what_an_ensemble_is_not_saved_as_is_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        fastens.Ensemble(members("unet")).save_pretrained(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_the_main_process_writes(tmp_path):
    fastens.Ensemble(members("unet")).save_pretrained(tmp_path / "new", is_main_process=False)
    assert not (tmp_path / "new").exists()


def test_what_would_change_what_is_loaded_is_refused(tmp_path):
    fastens.Ensemble(members("unet")).save_pretrained(tmp_path / "unet")
    assert fastens.Ensemble.from_pretrained(tmp_path, subfolder="unet", low_cpu_mem_usage=True).num_members == 3
    for option in ({"quantization_config": {"bits": 4}}, {"output_loading_info": True}):
        with pytest.raises(ValueError, match="leave it out"):
            fastens.Ensemble.from_pretrained(tmp_path / "unet", **option)


def test_a_pipeline_saves_a_variant(tmp_path):
    ensemble = fastens.Ensemble(members("unet"))
    pipe = DDIMPipeline(unet=ensemble, scheduler=DDIMScheduler())
    pipe.save_pretrained(tmp_path, variant="fp16", max_shard_size="20KB")
    again = DDIMPipeline.from_pretrained(tmp_path, variant="fp16")
    assert_same(again.unet, ensemble)
    with pytest.raises((OSError, ValueError), match=r"no file|variant"):
        DDIMPipeline.from_pretrained(tmp_path)


def wan():
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=1,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )


def test_modules_that_stay_in_float32_do(tmp_path):
    nets = [randomised(wan, seed).eval() for seed in range(2)]
    fastens.Ensemble(nets).save_pretrained(tmp_path)
    ensemble = fastens.Ensemble.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    reference = copy.deepcopy(nets)  # as from_pretrained(torch_dtype=...) makes them, which needs accelerate
    for net in reference:
        for name, parameter in net.named_parameters():
            kept = {*name.split(".")}.intersection(net._keep_in_fp32_modules)
            parameter.data = parameter.data.to(torch.float32 if kept else torch.bfloat16)
    dtypes = {name: parameter.dtype for name, parameter in reference[0].named_parameters()}
    assert {n.removeprefix("network."): p.dtype for n, p in ensemble.named_parameters()} == dtypes
    assert set(dtypes.values()) == {torch.float32, torch.bfloat16}
    video, text = torch.randn(1, 4, 2, 8, 8).bfloat16(), torch.randn(1, 5, 16).bfloat16()
    with torch.no_grad():
        ours = ensemble(video, torch.tensor([3]), text, return_dict=False)[0]
        theirs = torch.stack([net(video, torch.tensor([3]), text, return_dict=False)[0] for net in reference]).mean(0)
    assert relative_error(ours.float(), theirs.float()) < 2e-2


@pytest.mark.parametrize("kind", INPUTS)
def test_what_a_class_says_of_its_models_the_ensemble_says(kind):
    nets = members(kind)
    ensemble = fastens.Ensemble(nets)
    for name, value in vars(diffusers.ModelMixin).items():
        if not (name.startswith("__") or callable(value) or isinstance(value, property | classmethod)):
            assert getattr(type(ensemble), name) == getattr(type(nets[0]), name), name


def test_attributes_as_of_a_model(caplog):
    ensemble = fastens.Ensemble(members("unet"))
    ensemble.note = 5
    ensemble.register_to_config(told=5)
    with caplog.at_level(logging.WARNING, logger="diffusers.models.modeling_utils"):
        assert ensemble.note == 5
        assert ensemble.save_pretrained == ensemble.save_pretrained
    assert caplog.text == ""
    with pytest.warns(FutureWarning):
        assert ensemble.told == 5
    with pytest.raises(AttributeError) as error:
        _ = ensemble.nowhere
    assert str(error.value) == f"'{type(ensemble).__name__}' object has no attribute 'nowhere'"
    assert error.value.name == "nowhere"
    assert "UNet2DModel" in error.value.__notes__[0]


@pytest.mark.parametrize("kind", ["unet", "conditional"])
def test_gradient_checkpointing_changes_no_gradient(kind):
    nets = members(kind)
    plain, saving = fastens.Ensemble(nets).train(), fastens.Ensemble(nets).train()
    assert not saving.is_gradient_checkpointing
    saving.enable_gradient_checkpointing()
    assert saving.is_gradient_checkpointing
    for ensemble in (plain, saving):
        ensemble(**inputs(kind), return_dict=False)[0].square().sum().backward()
    assert saving.engine == "fold"
    scale = max(float(p.grad.abs().max()) for p in plain.parameters() if p.grad is not None)
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-5 * scale), name
    saving.disable_gradient_checkpointing()
    assert not saving.is_gradient_checkpointing


def test_projections_are_fused_in_every_member():
    nets = members("conditional")
    ensemble = fastens.Ensemble(nets)
    view = ensemble.with_rule("median")
    expected = looped(nets, "conditional")
    for change in ("fuse_qkv_projections", "unfuse_qkv_projections"):
        for model in (ensemble, *nets):
            getattr(model, change)()
        shapes = {name: tensor.shape for name, tensor in nets[0].state_dict().items()}
        assert {n.removeprefix("network."): t.shape[1:] for n, t in ensemble.state_dict().items()} == shapes
        assert [type(p) for p in ensemble.attn_processors.values()] == [
            type(p) for p in nets[0].attn_processors.values()
        ]
        assert ensemble.engine == "fold"
        for _ in range(3):
            assert relative_error(evaluated(ensemble, "conditional"), expected) < 1e-5
        assert view.network is ensemble.network
        median = torch.stack([evaluated(net, "conditional") for net in nets]).median(0).values
        assert relative_error(evaluated(view, "conditional"), median) < 1e-5


def test_a_setting_that_fails_leaves_the_ensemble_as_it_was():
    nets = members("conditional")
    ensemble = fastens.Ensemble(nets)
    processors = ensemble.attn_processors
    with pytest.raises(ValueError, match="number of processors"):
        ensemble.set_attn_processor({next(iter(processors)): next(iter(processors.values()))})
    masks = fastens.MCDropout(dit(), 2, p=0.1)
    before = list(masks.state_dict())
    with pytest.raises(AttributeError):
        masks.fuse_qkv_projections(1, 2, 3)
    assert list(masks.state_dict()) == before
    assert relative_error(evaluated(ensemble, "conditional"), looped(nets, "conditional")) < 1e-5


def test_layerwise_casting_is_that_of_every_member():
    nets = members("unet")
    ensemble = fastens.Ensemble(nets)
    options = {"storage_dtype": torch.float16, "compute_dtype": torch.float32}
    with pytest.warns(UserWarning, match="one by one"):
        ensemble.enable_layerwise_casting(**options)
    for net in nets:
        net.enable_layerwise_casting(**options)
    assert any(p.dtype == torch.float16 for p in ensemble.parameters())
    assert relative_error(evaluated(ensemble), looped(nets)) < 1e-6


def test_hooks_of_diffusers_belong_to_their_member():
    class Louder(ModelHook):
        def post_forward(self, module, output):
            return 1.5 * output

    nets = members("unet")
    for net in nets:
        HookRegistry.check_if_exists_or_initialize(net.conv_in).register_hook(Louder(), "louder")
    with pytest.warns(UserWarning, match=r"one by one: conv_in\.forward reaches"):
        ensemble = fastens.Ensemble(nets)
    assert relative_error(evaluated(ensemble), looped(nets)) < 1e-6


def flux(seed):
    torch.manual_seed(seed)
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 2, 2),
    ).eval()


@pytest.mark.parametrize("hooked", [False, True])
def test_scopes_that_pipelines_make_of_every_call_leave_plans_and_reach_hooks(hooked):
    """Transformers' pipelines call them in ``cache_context``, which tells stateful hooks what is called."""

    class Doubles(ModelHook):
        _is_stateful = True

        def __init__(self):
            super().__init__()
            self.manager = StateManager(BaseState)

        def reset_state(self, module):
            return module

        def post_forward(self, module, output):
            return output * (2 if self.manager.context.name == "doubled" else 1)

    members, given = ([flux(seed) for seed in range(2)] for _ in range(2))
    for each in (*members, *given) if hooked else ():
        HookRegistry.check_if_exists_or_initialize(each.proj_out).register_hook(Doubles(), "doubles")
    ensemble = fastens.Ensemble(given)
    generator = torch.Generator().manual_seed(0)
    drawn = functools.partial(torch.randn, generator=generator)
    call = {"hidden_states": drawn(1, 6, 4), "encoder_hidden_states": drawn(1, 5, 8), "timestep": torch.tensor([0.5])}
    call |= {"pooled_projections": drawn(1, 8), "img_ids": drawn(6, 3), "txt_ids": torch.zeros(5, 3)}
    with torch.no_grad():
        for name in ("plain", "doubled", "plain", "doubled", "plain"):
            with ExitStack() as scopes:
                for each in (ensemble, *members):
                    scopes.enter_context(each.cache_context(name))
                expected = torch.stack([member(**call).sample for member in members]).mean(0)
                assert relative_error(ensemble(**call).sample, expected) < 1e-5
    ensemble._reset_stateful_cache()  # as pipelines do at their end
    states = [each.state for each in ensemble.report().calls]
    assert hooked or states == ["planned"]
