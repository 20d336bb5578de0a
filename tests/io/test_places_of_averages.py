"""Averages in parts, in files and folders of their own, and beside what only looks like one: never other weights."""

import copy
import gzip
import io
import json
import os
import pickle
import tarfile
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fastens
from fastens.io.choice import Wish
from fastens.io.inspection import report
from tests.checkpoint_layouts import Net, lit_ema, made, shadow, state
from tests.io.test_layouts import assert_same, load
from tests.networks import randomised, small_unet

AVERAGE, RAW, OTHER = made(0), made(1), made(2)


def parameters(net):
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def buffers(net):
    return {name: buffer.clone() for name, buffer in net.named_buffers()}


def averaged(names):
    """The average's tensors of these names and the others of the weights."""
    net = copy.deepcopy(RAW)
    net.load_state_dict({name: tensor for name, tensor in state(AVERAGE).items() if name in names}, strict=False)
    return net


IN_PARTS = {
    "two dictionaries": {"ema": {"params": parameters(AVERAGE), "buffers": buffers(AVERAGE)}},
    "two at the root": {"ema_params": parameters(AVERAGE), "ema_buffers": buffers(AVERAGE)},
    "names in front": {f"ema.params.{n}": t for n, t in parameters(AVERAGE).items()}
    | {f"ema.buffers.{n}": t for n, t in buffers(AVERAGE).items()},
    "composer": {
        "algorithms": [
            (
                "EMA",
                {"ema_model": {"named_parameters_dict": parameters(AVERAGE), "named_buffers_dict": buffers(AVERAGE)}},
            )
        ]
    },
}  # fmt: skip


@pytest.mark.parametrize("name", IN_PARTS)
@pytest.mark.parametrize("both", [True, False])
def test_parameters_and_buffers_in_dictionaries_of_their_own_are_one_set(name, both, tmp_path):
    """The average's own buffers are taken, not those of the weights beside it."""
    raw = {"params": parameters(RAW), "buffers": buffers(RAW)} if both else state(RAW)
    content = {"model": raw, **IN_PARTS[name]}
    assert_same(load(content, tmp_path / "a.pt"), AVERAGE)
    assert_same(load(content, tmp_path / "a.pt", ema=False), RAW)
    assert any("buffers" in line for line in report(tmp_path / "a.pt", Wish(), Net) if line.startswith("ema=True"))


def test_a_part_that_holds_more_is_of_another_network(tmp_path):
    more = {**buffers(AVERAGE), "shift": torch.ones(8)}
    with pytest.raises(ValueError, match=r"ema"):
        load({"model": state(RAW), "ema": {"params": parameters(AVERAGE), "buffers": more}}, tmp_path / "a.pt")


def test_layers_of_another_network_are_no_parts(tmp_path):
    content = {"0.weight": torch.ones(4, 4), "1.bias": torch.ones(4)}
    with pytest.raises(ValueError, match="does not fit"):
        load(content, tmp_path / "a.pt", lambda: nn.Linear(4, 4))


REST_NOT_UNDERSTOOD = {
    "a list of buffers": {"shadow_params": list(AVERAGE.parameters()), "shadow_buffers": list(AVERAGE.buffers())},
    "another name": {"params": parameters(AVERAGE), "others": {"gain": torch.ones(8)}},
    "two of them": {"params": parameters(AVERAGE), "a": buffers(AVERAGE), "b": buffers(OTHER)},
}


@pytest.mark.parametrize("name", REST_NOT_UNDERSTOOD)
def test_buffers_beside_an_average_are_not_passed_over(name, tmp_path):
    content = {"model": state(RAW), "ema": REST_NOT_UNDERSTOOD[name]}
    with pytest.raises(ValueError, match=r"lacks \['scale'\], which may be in ema"):
        load(content, tmp_path / "a.pt")
    assert_same(load(content, tmp_path / "a.pt", ema=False), RAW)


@pytest.mark.parametrize(
    "kept", [{"collected_params": shadow(RAW)}, {"backup": parameters(RAW)}, {"collected_params": None}]
)
def test_what_is_put_back_after_an_evaluation_is_no_average(kept, tmp_path):
    content = {"model": state(RAW), "ema": {"decay": 0.9, "shadow_params": shadow(AVERAGE), **kept}}
    trainable = {name for name, p in AVERAGE.named_parameters() if p.requires_grad}
    assert_same(load(content, tmp_path / "a.pt"), averaged(trainable))
    assert_same(load(content, tmp_path / "a.pt", ema=False), RAW)


@pytest.mark.parametrize("place", ["", "model", "smooth"])
def test_counts_beside_the_weights_say_that_they_are_an_average(place, tmp_path):
    """torch's AveragedModel keeps ``n_averaged`` beside ``module``."""
    saved = {"n_averaged": torch.tensor(3), **state(AVERAGE, "module.")}
    content = {place: saved} if place else saved
    assert_same(load(content, tmp_path / "a.pt"), AVERAGE)
    with pytest.raises(ValueError, match="averaged weights alone"):
        load(content, tmp_path / "a.pt", ema=False)
    content = {"net": state(RAW), "best": saved}
    assert_same(load(content, tmp_path / "a.pt"), AVERAGE)
    assert_same(load(content, tmp_path / "a.pt", ema=False), RAW)


def test_a_state_of_LitEma_alone_is_an_average(tmp_path):
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    content = {"decay": torch.tensor(0.99), "num_updates": torch.tensor(3), **lit_ema(net, "")}
    factory = lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))  # noqa: E731
    assert_same(load(content, tmp_path / "a.pt", factory), net)
    with pytest.raises(ValueError, match="averaged weights alone"):
        load(content, tmp_path / "a.pt", factory, ema=False)


@pytest.mark.parametrize("version", ["0.10.7", None])
def test_mmengine_exchanges_the_average_and_the_weights(version, tmp_path):
    meta = {"epoch": 3, **({"mmengine_version": version} if version else {})}
    inside = {"steps": torch.tensor(3), **state(RAW, "module.")}
    content = {"meta": meta, "state_dict": state(AVERAGE), "ema_state_dict": inside, "message_hub": {}}
    assert_same(load(content, tmp_path / "a.pt"), AVERAGE if version else RAW)
    assert_same(load(content, tmp_path / "a.pt", ema=False), RAW if version else AVERAGE)
    assert any(line.startswith("state_dict: EMA") == bool(version) for line in report(tmp_path / "a.pt", Wish()))


@pytest.mark.parametrize("name", ["ewma", "ewa", "model_ewma", "EWA"])
def test_more_spellings_of_an_average(name, tmp_path):
    content = {"model": state(RAW), name: state(AVERAGE)}
    assert_same(load(content, tmp_path / "a.pt"), AVERAGE)
    assert_same(load(content, tmp_path / "a.pt", ema=False), RAW)


@pytest.mark.parametrize("name", ["grad_ema", "ema_grads", "ema_sq", "avg_square", "ema_variance", "ema_loss"])
def test_averages_of_something_else_are_not_the_weights(name, tmp_path):
    content = {"model": state(RAW), name: state(OTHER)}
    with pytest.raises(ValueError, match=rf"look like averages.*{name}"):
        load(content, tmp_path / "a.pt")
    assert_same(load(content, tmp_path / "a.pt", ema=False), RAW)


def test_an_average_that_was_left_on_other_devices_is_not_passed_over(tmp_path):
    content = {"model": state(RAW), "ema": {name: torch.empty(0) for name in state(RAW)}}
    with pytest.raises(ValueError, match=r"look like averages.*is \[0\] in the file"):
        load(content, tmp_path / "a.pt")
    content = {"model": state(RAW), "ema_losses": [torch.tensor(0.1), torch.tensor(0.2)]}
    assert_same(load(content, tmp_path / "a.pt"), RAW)


ADAPTERS = {
    "beside": {"model": state(RAW), "lora": {"inp.lora_A.weight": torch.ones(2, 5)}},
    "another": {"state_dict": state(RAW), "peft": {"unet.inp.lora.up.weight": torch.ones(2, 5)}},
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_beside_the_weights_is_named(name, tmp_path):
    with pytest.raises(ValueError, match=r"holds an adapter.*lora.*merge"):
        load(ADAPTERS[name], tmp_path / "a.pt")
    assert_same(load(ADAPTERS[name], tmp_path / "a.pt", key=next(iter(ADAPTERS[name]))), RAW)


def put(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif path.suffix == ".safetensors":
            save_file(content, path)
        else:
            torch.save(content, path)
    return folder


OWN_FILES = """ema_model.safetensors model_ema.safetensors model-ema.safetensors ema.pt ema.bin ema_weights.pth
    averaged.ckpt ema_0.9999_100.pt pytorch_model_ema.bin ema/model.safetensors
    ema/diffusion_pytorch_model.fp16.bin""".split()


@pytest.mark.parametrize("name", OWN_FILES)
@pytest.mark.parametrize("usual", ["model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors"])
def test_an_average_in_a_file_of_its_own_in_a_folder(name, usual, tmp_path):
    put(
        tmp_path,
        {usual: state(RAW), name: state(AVERAGE), "optimizer.bin": {}, "ema_optimizer.pt": {}, "ema.yaml": b""},
    )
    for options, expected in (
        ({}, AVERAGE),
        ({"ema": False}, RAW),
        ({"key": usual.rpartition(".")[0]}, RAW),
    ):
        assert_same(fastens.load_members([tmp_path], Net, **options)[0], expected)
    lines = list(report(tmp_path, Wish(), Net))
    assert any(line.startswith("ema=True: takes ") for line in lines)
    assert any(line.startswith(f"  {name.partition('/')[0]}: an average by its name") for line in lines)


def test_an_average_of_parameters_in_a_file_of_its_own(tmp_path):
    put(
        tmp_path,
        {"model.safetensors": state(RAW), "ema_state.pt": {"decay": 0.9, "shadow_params": shadow(AVERAGE, False)}},
    )
    assert_same(fastens.load_members([tmp_path], Net)[0], averaged(parameters(AVERAGE)))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"ema_0.9.pt": state(AVERAGE), "ema_0.99.pt": state(OTHER)}, r"2 sets of weights.*ema_0\.9 .*ema_0\.99 "),
        ({"model.ema.safetensors": state(AVERAGE), "ema.pt": state(OTHER)}, r"2 sets of weights.*model\.ema .*ema "),
        ({"vae_ema.safetensors": {"x": torch.ones(4, 4)}}, "look like averages.*vae_ema"),
        ({"modelema.pt": state(AVERAGE)}, "look like averages.*modelema"),
        ({"ema.pkl": pickle.dumps({"ema": 1})}, r"ema\.pkl is a pickle"),
        ({"ema.pt": b""}, r"ema\.pt cannot be read.* it is empty"),
    ],
)
def test_averages_in_a_folder_that_are_not_understood_are_named(files, message, tmp_path):
    put(tmp_path, {"model.safetensors": state(RAW), **files})
    with pytest.raises(ValueError, match=message):
        fastens.load_members([tmp_path], Net)[0]
    assert_same(fastens.load_members([tmp_path], Net, ema=False)[0], RAW)
    assert_same(fastens.load_members([tmp_path], Net, key="model")[0], RAW)


def test_what_is_no_file_is_not_read(tmp_path):
    put(tmp_path, {"model.safetensors": state(RAW), "ema/notes.txt": b"x"})
    os.mkfifo(tmp_path / "ema.pt")
    assert_same(fastens.load_members([tmp_path], Net)[0], RAW)


def test_an_average_is_all_that_a_folder_has(tmp_path):
    put(tmp_path, {"unet_ema.safetensors": state(AVERAGE)})
    assert_same(fastens.load_members([tmp_path], Net)[0], AVERAGE)
    with pytest.raises(ValueError, match="no weights for ema=False"):
        fastens.load_members([tmp_path], Net, ema=False)[0]


def test_networks_under_names_of_their_own_in_a_folder(tmp_path):
    put(tmp_path, {"unet.safetensors": state(RAW), "unet_ema.safetensors": state(AVERAGE)})
    assert_same(fastens.load_members([tmp_path], Net)[0], AVERAGE)
    assert_same(fastens.load_members([tmp_path], Net, ema=False)[0], RAW)


def test_averages_beside_a_diffusers_model_and_in_its_pipeline(tmp_path):
    nets = [randomised(small_unet, seed) for seed in range(2)]
    nets[1].save_pretrained(tmp_path / "unet")
    (tmp_path / "model_index.json").write_text(json.dumps({"unet": ["diffusers", "UNet2DModel"]}))
    put(tmp_path, {"unet/ema.pt": state(nets[0])})
    assert_same(fastens.load_members([tmp_path / "unet"])[0], nets[0])
    assert_same(fastens.load_members([tmp_path], ema=False)[0], nets[1])
    put(tmp_path, {"ema_unet.pt": state(nets[0])})
    with pytest.raises(ValueError, match=r"\['ema_unet.pt'\] beside the model unet, which look like averages"):
        fastens.load_members([tmp_path])[0]
    assert_same(fastens.load_members([tmp_path], ema=False)[0], nets[1])


@pytest.mark.parametrize(
    "files", [["adapter_config.json", "adapter_model.safetensors"], ["pytorch_lora_weights.safetensors"]]
)
@pytest.mark.parametrize("beside", [True, False])
def test_an_adapter_in_a_folder_is_named(files, beside, tmp_path):
    lora = {"inp.lora_A.weight": torch.ones(2, 5)}
    put(tmp_path, {name: lora if name.endswith("safetensors") else b"{}" for name in files})
    put(tmp_path, {"model.safetensors": state(RAW)} if beside else {})
    with pytest.raises(
        ValueError, match=r"holds an adapter \(LoRA\)" + (".*key='model'" if beside else ".*diffusers[)]$")
    ):
        fastens.load_members([tmp_path], Net)[0]
    if beside:
        assert_same(fastens.load_members([tmp_path], Net, key="model")[0], RAW)


def archive(kind):
    buffer = io.BytesIO()
    if kind == "tar":
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            tar.addfile(tarfile.TarInfo("model_weights.ckpt"))
    else:
        with zipfile.ZipFile(buffer, "w") as file:
            file.writestr("model/weights.npy", b"x")
    return buffer.getvalue()


BEGINNINGS = {
    "Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n",
    "GGUF": b"GGUF\x03\0\0\0" + b"\0" * 60,
    "HDF5": b"\x89HDF\r\n\x1a\n" + b"\0" * 60,
    "NumPy": b"\x93NUMPY\x01\0" + b" " * 60,
    "gzip": gzip.compress(b"x" * 100),
    "a tar archive": archive("tar"),
    r"an archive of \['model/weights.npy'\]": archive("zip"),
    "a web page": b"<!DOCTYPE html><html>404</html>",
    "empty": b"",
}


@pytest.mark.parametrize("what", BEGINNINGS)
@pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "a.bin", "model.safetensors"])
def test_files_of_other_formats_are_named_by_their_first_bytes(what, name, tmp_path):
    (tmp_path / name).write_bytes(BEGINNINGS[what])
    for path in (tmp_path / name, *([tmp_path] if name.startswith("model") else [])):
        with pytest.raises(ValueError, match=rf"{name} cannot be read.*: it is .*{what}"):
            fastens.load_members([path], Net)[0]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["model-Q4.gguf"], "model-Q4.gguf is a GGUF file"),
        (["flax_model.msgpack", "config.json"], "weights of Flax"),
        (["_CHECKPOINT_METADATA", "manifest.ocdbt"], "Orbax"),
    ],
)
def test_folders_of_other_formats_are_named(files, message, tmp_path):
    put(tmp_path, dict.fromkeys(files, b"{}"))
    with pytest.raises(ValueError, match=message):
        fastens.load_members([tmp_path], Net)[0]
