"""Files that were made to harm, or damaged: no code of theirs is run, and what leaves is a ValueError."""

import functools
import io
import json
import os
import pickle
import random
import socket
import zipfile

import pytest
import torch
from safetensors.torch import save_file

import fastens
from fastens.io.choice import Wish
from fastens.io.inspection import report
from tests.checkpoint_layouts import Net, made, state
from tests.networks import randomised, small_unet


class Touch:
    """A pickle of it makes a file when it is run."""

    def __init__(self, marker, how):
        self.marker, self.how = marker, how

    def __reduce__(self):
        return {
            "os.mkdir": (os.mkdir, (str(self.marker),)),
            "eval": (eval, (f"__import__('os').mkdir({str(self.marker)!r})",)),
            "partial": (functools.partial(os.mkdir, str(self.marker)), ()),
            "state": (Touch, (self.marker, self.how), {"x": Other(self.marker)}),
        }[self.how]

    def __setstate__(self, value):
        os.mkdir(self.marker)


class Other(Touch):
    def __init__(self, marker):
        super().__init__(marker, "os.mkdir")


@pytest.fixture
def offline(monkeypatch):
    """Any connection to a network is a failure that no handler of errors swallows."""
    tried = []

    def refuse(*args, **_):
        tried.append(args)
        raise OSError("the test has no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert tried == []


def read_all(path):
    list(report(path, Wish()))
    return fastens.load_members([path], Net)[0]


@pytest.mark.parametrize("how", ["os.mkdir", "eval", "partial", "state"])
@pytest.mark.parametrize("where", ["root", "beside", "in the optimizer", "as the average", "as a key"])
@pytest.mark.parametrize("kind", ["zip", "legacy", "protocol 4", "plain"])
def test_code_in_a_torch_file_is_not_run(how, where, kind, tmp_path):
    marker, path = tmp_path / "ran", tmp_path / "a.pt"
    evil = Touch(marker, how)
    content = {
        "root": evil,
        "beside": {"model": state(made(0)), "args": evil},
        "in the optimizer": {"model": state(made(0)), "optimizer": {"state": [evil]}},
        "as the average": {"model": state(made(0)), "ema": evil},
        "as a key": {"model": state(made(0)), evil: 1},
    }[where]
    if kind == "plain":
        path.write_bytes(pickle.dumps(content))
    else:
        protocol = 4 if kind == "protocol 4" else 2
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip", pickle_protocol=protocol)
    with pytest.raises(ValueError, match="execute code"):
        read_all(path)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["a.pkl", "diffusion_pytorch_model.bin"])
def test_code_in_other_files_is_not_run(name, tmp_path):
    marker = tmp_path / "ran"
    small_unet().save_config(tmp_path)
    (tmp_path / name).write_bytes(pickle.dumps(Touch(marker, "os.mkdir")))
    lines = list(report(tmp_path / name, Wish()))
    assert any("mkdir" in line for line in lines)
    with pytest.raises(ValueError, match="execute code"):
        fastens.load_members([tmp_path / name if name == "a.pkl" else tmp_path], Net)[0]
    assert not marker.exists()


def test_torch_script_is_not_run(tmp_path):
    torch.jit.trace(Net(), torch.ones(1, 5)).save(str(tmp_path / "a.pt"))
    with pytest.raises(ValueError, match="TorchScript"):
        read_all(tmp_path / "a.pt")


def nested(depth):
    value = {}
    for _ in range(depth):
        value = {"a": value}
    return value


def in_itself():
    value = {"model": state(made(0))}
    value["ema"] = value
    return value


def laughs():
    value = [1]
    for _ in range(40):
        value = [value, value]
    return {"model": state(made(0)), "x": value}


@pytest.mark.parametrize("make", [lambda: nested(60), lambda: nested(300), in_itself, laughs])
def test_contents_without_end(make, tmp_path):
    torch.save(make(), tmp_path / "a.pt")
    with pytest.raises(ValueError, match="nested"):
        read_all(tmp_path / "a.pt")


def test_nesting_deeper_than_the_interpreter(tmp_path):
    depth = 200_000
    data = b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."
    buffer = io.BytesIO()
    torch.save({}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(tmp_path / "a.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, data if name.endswith("data.pkl") else old.read(name))
    with pytest.raises(ValueError, match=r"nested|cannot be read"):
        read_all(tmp_path / "a.pt")


def files():
    def torch_file(**options):
        buffer = io.BytesIO()
        torch.save({"model": state(made(0)), "ema": state(made(1))}, buffer, **options)
        return buffer.getvalue()

    return {
        "zip.pt": torch_file(),
        "legacy.pt": torch_file(_use_new_zipfile_serialization=False),
        "a.safetensors": None,
        "plain.ckpt": pickle.dumps({"a": [1, 2, 3]}),
    }


@pytest.mark.parametrize("name", files())
def test_damaged_files_raise_what_is_documented(name, tmp_path):
    """Cut anywhere, or with bytes changed anywhere: the same weights, or a ValueError."""
    draw = random.Random(0)
    path = tmp_path / name
    data = files()[name]
    if data is None:
        save_file(state(made(0)), path)
        data = path.read_bytes()
    for trial in range(150):
        damaged = bytearray(data[: draw.randrange(len(data))] if trial % 3 == 0 else data)
        for _ in range(draw.choice((1, 1, 4, 40)) if trial % 3 else 0):
            damaged[draw.randrange(min(len(damaged), 2000) if trial % 2 else len(damaged))] = draw.randrange(256)
        path.write_bytes(damaged)
        for read in (lambda: list(report(path, Wish())), lambda: fastens.load_members([path], Net)[0]):
            refused = outcome(read)
            assert refused is None or (isinstance(refused, ValueError) and str(path) in str(refused)), repr(refused)


def outcome(read):
    try:
        read()
    except Exception as error:
        return error
    return None


HEADERS = {
    "no JSON": b"{" + b"x" * 40,
    "no object": b"[1, 2]",
    "not UTF-8": b'{"\xff": 1}',
    "unknown dtype": b'{"a":{"dtype":"F3","shape":[1],"data_offsets":[0,4]}}',
    "beyond the end": b'{"a":{"dtype":"F32","shape":[100],"data_offsets":[0,400]}}',
    "negative": b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
    "overflow": b'{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,4]}}',
    "deep": b'{"a":' * 3000,
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_of_safetensors(name, tmp_path):
    header = HEADERS[name]
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    with pytest.raises(ValueError, match=r"a\.safetensors cannot be read"):
        read_all(tmp_path / "a.safetensors")


@pytest.mark.parametrize("length", [0, 2**63, 2**64 - 1])
def test_length_of_the_header_of_safetensors(length, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match=r"a\.safetensors cannot be read"):
        read_all(tmp_path / "a.safetensors")


INDICES = {
    "a list": ([], "expected an object"),
    "no map": ({"metadata": {}}, "no 'weight_map'"),
    "a map of numbers": ({"weight_map": {"a": 3}}, "no 'weight_map'"),
    "an empty map": ({"weight_map": {}}, "no 'weight_map'"),
    "out of the folder": ({"weight_map": {"a": "../b.safetensors"}}, "a file beside it"),
    "absolute": ({"weight_map": {"a": "/etc/passwd"}}, "a file beside it"),
    "itself": ({"weight_map": {"a": "model.safetensors.index.json"}}, "a file beside it"),
    "missing shard": ({"weight_map": {"a": "b.safetensors"}}, "lacks the shard"),
    "missing name": ({"weight_map": {"a": "there.safetensors"}}, r"lacks \['a'\]"),
}


@pytest.mark.parametrize("name", INDICES)
def test_indices_of_shards(name, tmp_path):
    content, message = INDICES[name]
    save_file({"other": torch.ones(1)}, tmp_path / "there.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(content))
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        with pytest.raises(ValueError, match=message):
            fastens.load_members([path], Net)[0]


JSON = {
    "no JSON": b"{",
    "not UTF-8": b'{"_class_name": "\xff\xfe"}',
    "deep": b"[" * 100_000,
    "a list": b"[1]",
    "a string": b'"google/ddpm-cifar10-32"',
    "null": b"null",
    "huge number": b'{"_class_name": "UNet2DModel", "sample_size": ' + b"9" * 5000 + b"}",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A diffusers model and an ensemble of such, as their files say them."""
    root = tmp_path_factory.mktemp("saved")
    net = randomised(small_unet, 0)
    net.save_pretrained(root / "member")
    fastens.Ensemble([net, randomised(small_unet, 1)]).save_pretrained(root / "ensemble")
    fastens.MCDropout(net, 2).save_pretrained(root / "dropout")
    return root


def read_with(config, folder, tmp_path):
    """Read a folder again with another ``config.json``."""
    for file in folder.iterdir():
        if file.name != "config.json":
            (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").write_bytes(config)
    if folder.name == "member":
        return fastens.load_members([tmp_path])[0]
    return fastens.Ensemble.from_pretrained(tmp_path)


@pytest.mark.parametrize("folder", ["member", "ensemble"])
@pytest.mark.parametrize("name", JSON)
def test_configurations_that_are_none(folder, name, saved, tmp_path, offline):
    with pytest.raises(ValueError, match=r"config\.json|expected"):
        read_with(JSON[name], saved / folder, tmp_path)


CLASSES = [
    "",
    "os",
    "DiffusionPipeline",
    "DDIMPipeline",
    "DDPMScheduler",
    "logging",
    "__doc__",
    "utils",
    "a.b",
    "Nothing",
]


@pytest.mark.parametrize("folder", ["member", "ensemble"])
@pytest.mark.parametrize("name", [*CLASSES, None, 3, ["UNet2DModel"], {}])
def test_classes_that_are_no_models(folder, name, saved, tmp_path, offline):
    config = json.loads((saved / folder / "config.json").read_text())
    config["_class_name" if folder == "member" else "member_class"] = name
    with pytest.raises(ValueError, match=r"names the class|expected str"):
        read_with(json.dumps(config).encode(), saved / folder, tmp_path)


BAD_MEMBERS = [
    {"block_out_channels": "google/ddpm"},
    {"block_out_channels": [-1, 2]},
    {"block_out_channels": None},
    {"layers_per_block": "x"},
    {"down_block_types": ["NoSuchBlock", "DownBlock2D"]},
    {"act_fn": 3},
    {"norm_num_groups": 0},
    {"block_out_channels": [2**17, 2**17]},
    {"quantization_config": {"quant_method": "bitsandbytes"}},
]


@pytest.mark.parametrize("folder", ["member", "ensemble"])
@pytest.mark.parametrize("change", BAD_MEMBERS, ids=str)
def test_configurations_that_no_network_has(folder, change, saved, tmp_path, offline):
    config = json.loads((saved / folder / "config.json").read_text())
    (config if folder == "member" else config["member_config"]).update(change)
    with pytest.raises(ValueError, match=r"config\.json (describes|names)"):
        read_with(json.dumps(config).encode(), saved / folder, tmp_path)


@pytest.mark.parametrize("value", ["google/ddpm-cifar10-32", "member", ["google/ddpm"], 3, True])
def test_a_member_config_that_is_no_dictionary_asks_no_network(value, saved, tmp_path, offline):
    config = {**json.loads((saved / "ensemble" / "config.json").read_text()), "member_config": value}
    with pytest.raises(ValueError, match="expected a dictionary"):
        read_with(json.dumps(config).encode(), saved / "ensemble", tmp_path)


BAD_SETTINGS = [
    {"max_fold": -5},
    {"max_fold": 0},
    {"max_fold": "3"},
    {"max_fold": 2.5},
    {"max_fold": True},
    {"engine": "warp"},
    {"engine": None},
    {"engine": ["fold"]},
    {"backend": "cuda:0"},
    {"backend": {}},
    {"prediction": "noise"},
    {"prediction": 3},
    {"aggregate_in": "x0"},
    {"aggregate_in": "everything"},
    {"schedule": {"schedule": "none"}},
    {"schedule": "google/ddpm"},
    {"schedule": [1]},
    {"schedule": {"schedule": "vp", "no_such": 1}},
    {"unknown": 1},
    {"masks": "random", "p": None, "seed": 0},
    {"masks": "fixed", "p": 7, "seed": 0},
    {"masks": "fixed", "p": None, "seed": "x"},
    {"masks": "fixed"},
]
BAD_VALUES = [
    {"num_members": 0},
    {"num_members": -1},
    {"num_members": "2"},
    {"num_members": 2.0},
    {"num_members": True},
    {"num_members": 3},
    {"num_members": 10**30},
    {"rule": "mean"},
    {"rule": {}},
    {"rule": {"rule": "warp"}},
    {"rule": {"rule": ["mean"]}},
    {"rule": {"rule": "mean", "weights": [1, "x"]}},
    {"rule": {"rule": "mean", "weights": [0.2, 0.3, 0.5]}},
    {"rule": {"rule": "mean", "weights": 3}},
    {"rule": {"rule": "geometric", "eps": "x"}},
    {"shared": {"a": 1}},
    {"shared": [1]},
    {"shared": ["no_such"]},
    {"shared": "conv_in.weight"},
    {"settings": None},
    {"settings": []},
    {"member_class": None},
]


@pytest.mark.parametrize("change", [*({"settings": s} for s in BAD_SETTINGS), *BAD_VALUES], ids=str)
def test_an_ensemble_is_held_to_what_its_constructor_takes(change, saved, tmp_path, offline):
    config = json.loads((saved / "ensemble" / "config.json").read_text())
    if isinstance(change.get("settings"), dict):
        change = {"settings": {**config["settings"], **change["settings"]}}
    with pytest.raises(ValueError, match=r"config\.json|ensemble\.safetensors|weights"):
        read_with(json.dumps({**config, **change}).encode(), saved / "ensemble", tmp_path)


@pytest.mark.parametrize("folder", ["ensemble", "dropout"])
def test_what_was_saved_is_accepted(folder, saved, tmp_path):
    config = (saved / folder / "config.json").read_bytes()
    again = read_with(config, saved / folder, tmp_path)
    assert again.num_members == 2
