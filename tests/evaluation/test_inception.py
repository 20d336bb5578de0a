"""The feature network of FID from a local file: tiny networks saved as the real ones are, and no network access."""

import socket

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics.image import fid

from fastens.cli import main
from fastens.evaluation import features, inception, quality
from tests.networks import randomised, unet_2d


class Tiny(nn.Module):
    """Mean colours, and as many linear features of them as asked for."""

    def __init__(self, width: int = 2048):
        super().__init__()
        self.last = nn.Linear(3, width)

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        means = x.float().mean((2, 3)) / 255
        return self.last(means) if return_features else means


class FromWeights(Tiny):
    """What torchmetrics makes of torch-fidelity's file: called with a name, features and the path of a state dict."""

    def __init__(self, name: str, features_list: list, feature_extractor_weights_path: str | None = None):
        if feature_extractor_weights_path is None:
            raise AssertionError("torch-fidelity downloads its weights where it is given no path")
        state = torch.load(feature_extractor_weights_path, weights_only=True)
        super().__init__(len(state["last.bias"]))
        assert (name, features_list) == ("inception-v3-compat", ["2048"])
        self.load_state_dict(state)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, True)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr(fid, "NoTrainInceptionV3", FromWeights)


def saved(kind, path, width=2048):
    torch.manual_seed(0)
    network = Tiny(width)
    if kind == "script":
        torch.jit.script(network).save(str(path))
    else:
        torch.save(network.state_dict(), path)
    return network


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("kind", ["script", "weights"])
def test_features_from_a_local_file(kind, tmp_path):
    network = saved(kind, tmp_path / "inception.pth")
    images = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    found = features(inception(tmp_path / "inception.pth"), images, batch_size=2)
    assert torch.allclose(found, network(images, True), atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("kind", ["script", "weights"])
def test_wrong_width(kind, tmp_path):
    saved(kind, tmp_path / "inception.pth", 192)
    with pytest.raises(ValueError, match=r"inception\.pth gives \[2, 192\] for 2 images, expected \[2, 2048\]"):
        inception(tmp_path / "inception.pth")


def test_no_file_is_not_downloaded(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"weights\.pth does not exist"):
        inception(tmp_path / "weights.pth")


def test_another_file(tmp_path):
    path = tmp_path / "text.pth"
    path.write_text("no weights")
    with pytest.raises(ValueError, match="neither Inception's weights nor a TorchScript"):
        inception(path)
    torch.save({"other": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="neither Inception's weights nor a TorchScript"):
        inception(path)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_command_line(tmp_path, capsys):
    """The weights are read, and a Fréchet distance of 2048 features is refused with the number that it needs."""
    randomised(lambda: unet_2d(False), 0).save_pretrained(tmp_path / "member")
    saved("script", tmp_path / "inception.pt")
    np.save(tmp_path / "images.npy", np.zeros((8, 3, 8, 8), dtype=np.uint8))
    arguments = ["evaluate", str(tmp_path / "member"), "--data", str(tmp_path / "images.npy")]
    arguments += ["--inception", str(tmp_path / "inception.pt"), "--samples", "40", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        main(arguments)
    assert "40 generated samples are too few" in capsys.readouterr().err


def test_too_few_for_inception():
    with pytest.raises(ValueError, match="needs at least 2049"):
        quality(torch.zeros(2048, 2048), torch.zeros(2100, 2048))
