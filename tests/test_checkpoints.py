"""Members from files, ensembles to and from files."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fastens
from tests.fresh import python
from tests.networks import mlp, randomised, small_unet
from tests.tolerances import relative_error


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("members")
    for seed in range(2):
        randomised(small_unet, seed).save_pretrained(root / f"member_{seed}")
    return [root / f"member_{seed}" for seed in range(2)]


@pytest.fixture
def copies(folders, tmp_path):
    return [shutil.copytree(folder, tmp_path / folder.name) for folder in folders]


def test_diffusers_folders(folders):
    x = torch.randn(2, 1, 8, 8)
    ensemble = fastens.Ensemble(folders)
    members = [randomised(small_unet, seed) for seed in range(2)]
    with torch.no_grad():
        expected = (members[0](x, 3).sample + members[1](x, 3).sample) / 2
        assert relative_error(ensemble(x, 3).sample, expected) < 1e-5


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_files_with_a_factory(tmp_path, suffix):
    members = [randomised(mlp, seed) for seed in range(2)]
    paths = [tmp_path / f"{k}{suffix}" for k in range(2)]
    for member, path in zip(members, paths, strict=True):
        if suffix == ".pt":
            torch.save({"model": {}, "ema": member.state_dict()}, path)
        else:
            save_file(member.state_dict(), path)
    x = torch.randn(3, 5)
    ensemble = fastens.Ensemble(fastens.load_members(paths, mlp))
    with torch.no_grad():
        assert relative_error(ensemble(x), (members[0](x) + members[1](x)) / 2) < 1e-5
    with pytest.raises(ValueError, match="pass factory="):
        fastens.load_members(paths)


def test_truncated(copies):
    weights = next(copies[1].glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"member_1.*truncated"):
        fastens.Ensemble(copies)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("length", [0, 300, -20])
def test_truncated_file(tmp_path, suffix, length):
    path = tmp_path / f"member{suffix}"
    state = randomised(mlp, 0).state_dict()
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=rf"member\{suffix} cannot be read, it may be truncated"):
        fastens.Ensemble(fastens.load_members([path], mlp))


def edited(folder, **changes):
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("changes", [{"block_out_channels": [8]}, {"layers_per_block": 2}])
def test_weights_of_another_architecture(copies, changes):
    edited(copies[1], **changes)
    with pytest.raises(ValueError, match=r"member_1 does not fit the UNet2DModel .* another architecture"):
        fastens.Ensemble(copies)


def test_folder_that_is_no_model(copies):
    edited(copies[1], _class_name="NoSuchNet")
    with pytest.raises(ValueError, match="'NoSuchNet', which diffusers"):
        fastens.Ensemble(copies)
    (copies[1] / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json cannot be read"):
        fastens.Ensemble(copies)
    (copies[1] / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config.json"):
        fastens.Ensemble(copies)
    next(copies[0].glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match=r"has no weights, expected"):
        fastens.Ensemble(copies)


def test_file_of_another_architecture(tmp_path):
    save_file(randomised(mlp, 0).state_dict(), tmp_path / "a.safetensors")
    members = fastens.load_members([tmp_path / "a.safetensors"], lambda: torch.nn.Linear(5, 4))
    with pytest.raises(ValueError, match="does not fit the network that factory makes"):
        fastens.Ensemble(members)
    torch.save([1, 2], tmp_path / "a.pt")
    with pytest.raises(ValueError, match="no dictionary of tensors"):
        fastens.Ensemble(fastens.load_members([tmp_path / "a.pt"], mlp))


def test_members_differ_across_folders(folders, tmp_path):
    randomised(lambda: small_unet(True), 0).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="member 1 differs from member 0 at"):
        fastens.Ensemble([folders[0], tmp_path / "other"], engine="fold")


def test_saved_ensemble_that_is_damaged(tmp_path):
    ensemble = fastens.Ensemble([randomised(mlp, seed) for seed in range(2)])
    ensemble.save_pretrained(tmp_path)
    stacks, config = tmp_path / "ensemble.safetensors", tmp_path / "config.json"
    with pytest.raises(ValueError, match=r"0.weight is \(2, 16, 5\), the member needs \(2, 4, 5\)"):
        fastens.Ensemble.from_pretrained(tmp_path, factory=lambda: torch.nn.Sequential(torch.nn.Linear(5, 4)))
    stacks.write_bytes(stacks.read_bytes()[:100])
    with pytest.raises(ValueError, match="truncated"):
        fastens.Ensemble.from_pretrained(tmp_path, factory=mlp)
    stacks.unlink()
    with pytest.raises(ValueError, match=r"has no ensemble.safetensors"):
        fastens.Ensemble.from_pretrained(tmp_path, factory=mlp)
    config.write_text('{"num_members": 2}')
    with pytest.raises(ValueError, match="lacks rule, shared"):
        fastens.Ensemble.from_pretrained(tmp_path, factory=mlp)
    config.write_text("{}")
    with pytest.raises(ValueError, match="describes no ensemble"):
        fastens.Ensemble.from_pretrained(tmp_path, factory=mlp)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        fastens.Ensemble.from_pretrained(tmp_path / "nowhere", factory=mlp)


def test_output_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file/below cannot be written: .*; choose another"):
        fastens.Ensemble([randomised(mlp, 0)]).save_pretrained(tmp_path / "file" / "below")


def test_pickles_are_refused(copies, tmp_path):
    next(copies[1].glob("*.safetensors")).unlink()
    torch.save({}, copies[1] / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="pickle"):
        fastens.Ensemble(copies)
    torch.save(randomised(mlp, 0), tmp_path / "whole.pt")
    with pytest.raises(ValueError, match="execute code"):
        fastens.Ensemble(fastens.load_members([tmp_path / "whole.pt"], mlp))
    (tmp_path / "a.pkl").write_bytes(b"")
    with pytest.raises(ValueError, match="execute code"):
        fastens.load_members([tmp_path / "a.pkl"], mlp)


def test_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        fastens.load_members([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="paths is empty"):
        fastens.load_members([])
    with pytest.raises(TypeError, match="one path"):
        fastens.load_members("one")


def test_round_trip_with_a_factory(tmp_path):
    ensemble = fastens.Ensemble([randomised(mlp, seed) for seed in range(2)], fastens.rules.Mean([0.25, 0.75]))
    ensemble.save_pretrained(tmp_path / "saved")
    again = fastens.Ensemble.from_pretrained(tmp_path / "saved", factory=mlp)
    x = torch.randn(3, 5)
    with torch.no_grad():
        assert torch.equal(again(x), ensemble(x))
    assert again.rule == ensemble.rule
    with pytest.raises(ValueError, match="pass factory="):
        fastens.Ensemble.from_pretrained(tmp_path / "saved")


def test_pipeline_reloads_in_a_process_that_only_imported_fastens(folders, tmp_path):
    from diffusers import DDIMPipeline, DDIMScheduler

    pipe = DDIMPipeline(unet=fastens.Ensemble(folders), scheduler=DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    images = pipe(2, torch.Generator().manual_seed(0), num_inference_steps=3, output_type="np").images
    pipe.save_pretrained(tmp_path / "pipe")
    code = f"""
import fastens, sys
assert "diffusers" not in sys.modules
import torch
from diffusers import DDIMPipeline
pipe = DDIMPipeline.from_pretrained({str(tmp_path / "pipe")!r})
pipe.set_progress_bar_config(disable=True)
images = pipe(2, torch.Generator().manual_seed(0), num_inference_steps=3, output_type="np").images
torch.save(torch.tensor(images), {str(tmp_path / "images.pt")!r})
half = DDIMPipeline.from_pretrained({str(tmp_path / "pipe")!r}, torch_dtype=torch.bfloat16)
assert half.unet.dtype == torch.bfloat16 and half.unet.num_members == 2
"""
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert torch.equal(torch.load(tmp_path / "images.pt"), torch.tensor(images))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state": {}, "param_groups": []}, "optimiser's state"),
        ({"weights": 3}, "holds no dictionary of tensors"),
        ([1, 2], "holds a list"),
        ({"model": mlp().state_dict(), "ema": {"shadow_params": [torch.ones(2)]}}, "1 averaged parameters"),
        ({"other": torch.ones(1)}, "does not fit the network"),
    ],
)
def test_unknown_layouts_are_named(tmp_path, content, message):
    path = tmp_path / "checkpoint.pt"
    torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        fastens.Ensemble(fastens.load_members([path], mlp))


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, dtype=torch.complex64))
        self.register_buffer("table", torch.zeros(2, dtype=torch.uint8))
        self.register_buffer("mask", torch.zeros(2, dtype=torch.bool))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        return x


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("table", torch.tensor([300, 5]), "torch.int64 in the file, of values that torch.uint8 in the network"),
        ("table", torch.tensor([2.5, 5.0]), "torch.float32 in the file, of values that torch.uint8 in the network"),
        ("table", torch.tensor([-1, 5]), "of values that torch.uint8"),
        ("mask", torch.tensor([2, 0]), "of values that torch.bool"),
        ("weight", torch.ones(2), "torch.float32 in the file and torch.complex64 in the network"),
        ("table", torch.tensor([7, 5]), None),
        ("table", torch.tensor([7.0, 5.0]), None),
        ("mask", torch.tensor([1, 0], dtype=torch.uint8), None),
        ("weight", torch.ones(2, dtype=torch.complex128), None),
        ("num_batches_tracked", torch.tensor(99.5), None),  # the mean of a moving average
    ],
)
def test_values_that_a_network_has_no_place_for(name, value, message, tmp_path):
    torch.save({**Mixed().state_dict(), name: value}, tmp_path / "a.pt")
    members = fastens.load_members([tmp_path / "a.pt"], Mixed)
    if message is not None:
        with pytest.raises(ValueError, match=f"{name} is .*{message}"):
            members[0]
    elif name != "num_batches_tracked":
        assert torch.equal(members[0].state_dict()[name].to(value.dtype), value)
