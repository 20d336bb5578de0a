"""Which weights of a folder are taken: variants, pipelines, training states, shards, patterns."""

import json

import pytest
import torch
from safetensors.torch import save_file

import fastens
from tests.checkpoint_layouts import Net, made, shadow, state
from tests.networks import randomised, small_unet


@pytest.fixture(scope="module")
def unets():
    return [randomised(small_unet, seed) for seed in range(3)]


def loaded_from(path, **options):
    return fastens.load_members([path], **options)[0]


def which(loaded, networks):
    """The index of the network whose weights were loaded."""
    ours = loaded.state_dict()
    same = [all(torch.equal(ours[k], v.float()) for k, v in n.state_dict().items()) for n in networks]
    return same.index(True) if any(same) else None


# Variants in the folder, in the order of the networks, and which is taken under ema=True and ema=False.
VARIANTS = [
    (("", "ema"), 1, 0),
    (("non_ema", ""), 1, 0),
    (("non_ema", "ema"), 1, 0),
    (("", "fp16"), 0, 0),
    (("fp16",), 0, 0),
    (("", "ema.fp16"), 1, 0),
    (("fp16", "ema"), 1, 0),
    (("ema",), 0, "no weights for ema=False"),
    (("fp16", "bf16"), "several weights for ema=True", "several weights for ema=False"),
    (("", "modelema"), "several weights for ema=True", 0),
    (("", "best"), 0, 0),
    (("fp16", "best"), "several weights for ema=True", "several weights for ema=False"),
]


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize(("variants", "averaged", "raw"), VARIANTS, ids=lambda value: str(value))
def test_variants(variants, averaged, raw, suffix, unets, tmp_path):
    for variant, net in zip(variants, unets, strict=False):
        net.save_pretrained(tmp_path, variant=variant or None, safe_serialization=suffix == "safetensors")
    for ema, expected in ((True, averaged), (False, raw)):
        if isinstance(expected, str):
            with pytest.raises(ValueError, match=rf"{expected}.*variant="):
                loaded_from(tmp_path, ema=ema)
        else:
            loaded = loaded_from(tmp_path, ema=ema)
            assert which(loaded, unets) == expected
            assert not loaded.training
    for k, variant in enumerate(variants):
        if variant:
            assert which(loaded_from(tmp_path, variant=variant), unets) == k
    with pytest.raises(ValueError, match=r"no weights for variant='other'; it has"):
        loaded_from(tmp_path, variant="other")


def test_safetensors_before_torch_files(unets, tmp_path):
    unets[1].save_pretrained(tmp_path, safe_serialization=False)
    unets[0].save_pretrained(tmp_path)
    assert which(loaded_from(tmp_path), unets) == 0


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards(variant, unets, tmp_path):
    unets[0].save_pretrained(tmp_path, max_shard_size="30KB", variant=variant)
    assert len(list(tmp_path.glob("*-of-*"))) > 1
    assert which(loaded_from(tmp_path), unets) == 0
    index = next(tmp_path.glob("*index*"))
    assert which(fastens.load_members([index], small_unet)[0], unets) == 0
    next(tmp_path.glob("*-00001-of-*")).unlink()
    with pytest.raises(ValueError, match=r"lacks the shard .*00001"):
        loaded_from(tmp_path)


def test_shards_over_a_whole_file_are_taken_as_diffusers_takes_them(unets, tmp_path):
    unets[1].save_pretrained(tmp_path)
    unets[0].save_pretrained(tmp_path, max_shard_size="30KB")
    assert which(type(unets[0]).from_pretrained(tmp_path), unets) == 0
    assert which(loaded_from(tmp_path), unets) == 0
    unets[2].save_pretrained(tmp_path)  # takes the shards away, not their index
    with pytest.raises(ValueError, match="lacks the shard"):
        loaded_from(tmp_path)


def test_a_factory_is_not_ignored(unets, tmp_path):
    unets[0].save_pretrained(tmp_path)
    made_here = []

    class Own(type(unets[0])):
        pass

    def factory():
        made_here.append(Own.from_config(dict(unets[0].config)))
        return made_here[-1]

    assert isinstance(loaded_from(tmp_path, factory=factory), Own)
    with pytest.raises(ValueError, match="does not fit the network that factory makes"):
        loaded_from(tmp_path, factory=Net)


def test_pipelines(unets, tmp_path):
    from diffusers import AutoencoderKL

    unets[0].save_pretrained(tmp_path / "unet")
    AutoencoderKL(block_out_channels=(32,)).save_pretrained(tmp_path / "vae")
    (tmp_path / "model_index.json").write_text(json.dumps({"unet": ["diffusers", "UNet2DModel"]}))
    assert which(loaded_from(tmp_path), unets) == 0
    unets[1].save_pretrained(tmp_path / "unet_ema")
    assert which(loaded_from(tmp_path), unets) == 1
    assert which(loaded_from(tmp_path, ema=False), unets) == 0
    unets[2].save_pretrained(tmp_path / "unet_2")
    with pytest.raises(ValueError, match=r"holds the models unet, unet_2, unet_ema: say which by key="):
        loaded_from(tmp_path, ema=False)
    assert which(loaded_from(tmp_path, ema=False, key="unet_2"), unets) == 2


def test_averages_that_diffusers_saves(unets, tmp_path):
    from diffusers import UNet2DModel
    from diffusers.training_utils import EMAModel

    average = EMAModel(unets[0].parameters(), model_cls=UNet2DModel, model_config=unets[0].config)
    average.save_pretrained(tmp_path / "unet_ema")
    unets[1].save_pretrained(tmp_path / "unet")
    assert which(loaded_from(tmp_path), unets) == 0
    torch.save(average.state_dict(), tmp_path / "ema.pt")
    assert which(fastens.load_members([tmp_path / "ema.pt"], small_unet)[0], unets) == 0


@pytest.mark.parametrize("kept", ["shadow_params", "ema-pytorch"])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_states_of_accelerate(kept, suffix, tmp_path):
    average, raw = made(0), made(1)
    with torch.no_grad():
        raw.scale.copy_(average.scale)
        raw.frozen.copy_(average.frozen)
    if suffix == "bin":
        torch.save(state(raw), tmp_path / "pytorch_model.bin")
    else:
        save_file(state(raw), tmp_path / "model.safetensors")
    torch.save({"state": {}, "param_groups": []}, tmp_path / "optimizer.bin")
    torch.save({"random_state": 1}, tmp_path / "random_states_0.pkl")
    plain = fastens.load_members([tmp_path], Net)[0]
    assert torch.equal(plain.inp.weight, raw.inp.weight)
    ema = (
        {"decay": 0.9, "shadow_params": shadow(average)}
        if kept == "shadow_params"
        else {**state(average, "ema_model."), **state(raw, "online_model."), "step": torch.tensor(1)}
    )
    torch.save(ema, tmp_path / "custom_checkpoint_0.pkl")
    for options, expected in (({}, average), ({"ema": False}, raw), ({"key": "custom_checkpoint_0"}, average)):
        loaded = fastens.load_members([tmp_path], Net, **options)[0]
        for name, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, expected.state_dict()[name]), (options, name)
    with pytest.raises(ValueError, match="pass factory="):
        fastens.load_members([tmp_path])[0]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["zero_to_fp32.py", "latest"], "DeepSpeed"),
        ([".metadata", "__0_0.distcp"], "dcp_to_torch_save"),
        (["notes.txt"], r"it has \['notes.txt'\]"),
        ([], "it is empty"),
    ],
)
def test_folders_without_weights_say_what_they_are(files, message, tmp_path):
    for file in files:
        (tmp_path / file).touch()
    with pytest.raises(ValueError, match=message):
        fastens.load_members([tmp_path], Net)[0]


def test_a_saved_ensemble_is_no_member(tmp_path):
    fastens.Ensemble([made(0), made(1)]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"saved ensemble.*from_pretrained"):
        fastens.load_members([tmp_path], Net)[0]


def test_patterns_are_members_in_natural_order(tmp_path):
    for k in (10, 2, 1):
        folder = tmp_path / f"run-{k}"
        folder.mkdir()
        torch.save({"ema": state(made(k))}, folder / "last.pt")
    pattern = str(tmp_path / "run-*" / "last.pt")
    for paths in (pattern, [pattern]):
        members = fastens.load_members(paths, Net)
        assert [path.parent.name for path in members.paths] == ["run-1", "run-2", "run-10"]
        assert torch.equal(members[2].inp.weight, made(10).inp.weight)
    with pytest.raises(FileNotFoundError, match="no checkpoint matches"):
        fastens.load_members([str(tmp_path / "walk-*")], Net)
    with pytest.raises(ValueError, match="named twice"):
        fastens.load_members([pattern, tmp_path / "run-2" / "last.pt"], Net)
    assert len(fastens.load_members([tmp_path / "run-2" / "last.pt"] * 2, Net)) == 2  # as the caller says
    bracketed = tmp_path / "run[1].pt"
    torch.save(state(made(4)), bracketed)
    assert fastens.load_members([bracketed], Net).paths == [bracketed]


def test_variants_are_of_folders(tmp_path):
    torch.save(state(made(0)), tmp_path / "a.pt")
    with pytest.raises(ValueError, match="files of a folder"):
        fastens.load_members([tmp_path / "a.pt"], Net, variant="fp16")[0]
