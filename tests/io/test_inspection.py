"""``fastens inspect``: what is in a checkpoint, and which weights of it would be taken."""

import pickle
import re

import pytest
import torch

import fastens
from fastens.cli import main
from fastens.io.containers import read
from fastens.io.inspection import groups
from fastens.io.names import STATE
from tests.checkpoint_layouts import BOTH, ONE, Net, made, state
from tests.networks import randomised, small_unet


@pytest.mark.parametrize("layout", BOTH)
def test_it_says_what_load_members_takes(layout, tmp_path, capsys):
    average, raw = made(0), made(1)
    path = tmp_path / "a.pt"
    torch.save(BOTH[layout](average, raw), path)
    main(["inspect", str(path), "--factory", "tests.checkpoint_layouts:Net"])
    printed = capsys.readouterr().out
    taken = dict(re.findall(r"^ema=(True|False): takes (.*) \(", printed, re.M))
    assert taken.keys() == {"True", "False"}, printed
    for ema in (True, False):
        loaded = fastens.load_members([path], Net, ema, key=taken[str(ema)] or None)[0]
        assert torch.equal(loaded.inp.weight, (raw, average)[ema].inp.weight)
    main(["inspect", str(path)])
    by_names = capsys.readouterr().out
    assert re.search(r"^ema=True: takes \S+, if it fits the network$", by_names, re.M), by_names


@pytest.mark.parametrize("layout", ONE)
def test_every_tensor_is_listed_once(layout, tmp_path, capsys):
    net = made(0)
    torch.save(ONE[layout](net), tmp_path / "a.pt")
    main(["inspect", str(tmp_path / "a.pt"), "--names"])
    printed = capsys.readouterr().out
    there = groups(read(tmp_path / "a.pt"))
    assert sum(len(group.tensors) for group in there if group.kind != STATE) == len(net.state_dict())
    listed = re.findall(r"^  \S+ \[[\d, ]*\]$", printed, re.M)
    assert len(listed) == sum(len(group.tensors) for group in there)


def test_equal_weights_have_equal_hashes(tmp_path, capsys):
    net = made(0)
    torch.save({"a": state(net), "b": state(net, "module."), "c": state(made(1))}, tmp_path / "a.pt")
    main(["inspect", str(tmp_path / "a.pt")])
    hashes = re.findall("hash ([0-9a-f]{16})", capsys.readouterr().out)
    assert len(hashes) == 3
    assert len(set(hashes)) == 2


def test_folders_need_no_factory(tmp_path, capsys):
    randomised(small_unet, 0).save_pretrained(tmp_path)
    randomised(small_unet, 1).save_pretrained(tmp_path, variant="ema")
    main(["inspect", str(tmp_path)])
    printed = capsys.readouterr().out
    assert re.search(r"safetensors: variant plain, sha256 [0-9a-f]{64}", printed)
    assert "variant ema" in printed
    assert "which fits the UNet2DModel" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nowhere"], "nowhere does not exist"), (["{file}"], "cannot be read"), (["{file}", "--factory", "no:no"], "no")],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, capsys):
    (tmp_path / "a.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(SystemExit):
        main(["inspect", *(a.format(file=tmp_path / "a.pt") for a in arguments)])
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


def test_a_pickle_is_listed_and_not_run(tmp_path, capsys):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"ema": made(0)}, protocol=4))
    main(["inspect", str(tmp_path / "a.pkl")])
    assert "names" in (printed := capsys.readouterr().out)
    assert "tests.checkpoint_layouts.Net" in printed
