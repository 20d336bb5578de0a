"""Ids of the Hugging Face hub: read from its cache on this machine, else an error that says what to do."""

import pytest

import fastens
from tests.networks import randomised, small_unet

huggingface_hub = pytest.importorskip("huggingface_hub")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache that holds one pipeline's network, as the hub's own client lays it out."""
    root = tmp_path / "hub" / "models--someone--digits"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    randomised(small_unet, 3).save_pretrained(root / "snapshots" / COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_an_id_is_read_from_the_cache(cache):
    (member,) = fastens.load_members(["someone/digits"])
    expected = randomised(small_unet, 3).state_dict()
    assert all((member.state_dict()[name] == tensor).all() for name, tensor in expected.items())
    assert fastens.Ensemble(["someone/digits"]).num_members == 1


def test_an_id_that_is_not_cached_says_what_to_do(cache):
    with pytest.raises(FileNotFoundError, match=r"checkpoint someone/faces does not exist.*hf download someone/faces"):
        fastens.load_members(["someone/faces"])


def test_a_path_of_that_name_goes_first(cache):
    randomised(small_unet, 4).save_pretrained(cache / "someone" / "digits")
    (member,) = fastens.load_members(["someone/digits"])
    expected = randomised(small_unet, 4).state_dict()
    assert all((member.state_dict()[name] == tensor).all() for name, tensor in expected.items())


@pytest.mark.parametrize("name", ["runs/last.ckpt", "a/b/c", "digits"])
def test_what_is_no_id_is_a_path_that_is_missing(cache, name):
    with pytest.raises(FileNotFoundError) as raised:
        fastens.load_members([name], factory=small_unet)
    assert str(raised.value) == f"checkpoint {name} does not exist"
