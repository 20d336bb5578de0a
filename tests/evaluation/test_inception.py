"""The feature network of FID from a local file: tiny networks saved as the real ones are, and no network access."""

import socket

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastens.cli import main
from fastens.evaluation import features, inception, quality
from fastens.evaluation.inception import Inception
from tests.networks import randomised, small_unet


class Tiny(nn.Module):
    """Mean colours, and as many linear features of them as asked for."""

    def __init__(self, width: int = 2048):
        super().__init__()
        self.last = nn.Linear(3, width)

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        means = x.float().mean((2, 3)) / 255
        return self.last(means) if return_features else means


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)


def saved(path, width=2048):
    torch.manual_seed(0)
    network = Tiny(width)
    torch.jit.script(network).save(str(path))
    return network


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A network of random weights, and the file of its state dict."""
    torch.manual_seed(0)
    network = Inception()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.05, 0.2)
    path = tmp_path_factory.mktemp("inception") / "weights-inception-2015-12-05-6726825d.pth"
    torch.save(network.state_dict(), path)
    return network.eval(), path


def images(num, size=17):
    return torch.randint(0, 256, (num, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(num))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_features_from_a_script(tmp_path):
    network = saved(tmp_path / "inception.pt")
    found = features(inception(tmp_path / "inception.pt"), images(5), batch_size=2)
    assert torch.allclose(found, network(images(5), True), atol=1e-6)


def test_features_from_weights(weights):
    network, path = weights
    loaded = inception(path)
    assert isinstance(loaded, Inception)
    found = features(loaded, images(3), batch_size=2)
    with torch.no_grad():
        assert torch.allclose(found, network(images(3)), rtol=1e-4, atol=1e-4 * float(found.abs().max()))
        logits = features(loaded.logits, images(3))
        assert torch.allclose(logits, found @ network.fc.weight.T, rtol=1e-4, atol=1e-4 * float(logits.abs().max()))
    assert found.std() > 1e-3
    assert not torch.allclose(found[0], found[1])
    with pytest.raises(ValueError, match=r"torch.float32 \[2, 3, 17, 17\], expected torch.uint8"):
        loaded(images(2).float())


def test_layout_is_that_of_the_published_weights(weights):
    """Facts about the file: names and shapes at its ends, how many there are, and how many numbers."""
    state = weights[0].state_dict()
    assert len(state) == 94 * 6 + 2
    assert state["Conv2d_1a_3x3.conv.weight"].shape == (32, 3, 3, 3)
    assert state["Mixed_6c.branch7x7dbl_5.conv.weight"].shape == (192, 160, 1, 7)
    assert state["Mixed_7c.branch3x3dbl_3b.conv.weight"].shape == (384, 384, 3, 1)
    assert state["fc.weight"].shape == (1008, 2048)
    assert sum(x.numel() for x in state.values() if x.ndim) == 23_885_392  # 95.5 MB in float32


def test_features_are_torchmetrics_own(weights):
    pytest.importorskip("torch_fidelity", reason="torch-fidelity, which needs torchvision, is not installed")
    from torchmetrics.image import fid

    theirs = fid.NoTrainInceptionV3("inception-v3-compat", ["2048"], str(weights[1]))
    assert torch.allclose(inception(weights[1])(images(3)), theirs(images(3)), rtol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_wrong_width(tmp_path):
    saved(tmp_path / "inception.pth", 192)
    with pytest.raises(ValueError, match=r"inception\.pth gives \[2, 192\] for 2 images, expected \[2, 2048\]"):
        inception(tmp_path / "inception.pth")


CHANGES = {
    "wrong shape": (
        lambda state: state | {"fc.weight": torch.zeros(1000, 2048)},
        r"fc\.weight is \[1000, 2048\], expected \[1008, 2048\]",
    ),
    "missing": (
        lambda state: {name: x for name, x in state.items() if name != "Mixed_7c.branch_pool.bn.bias"},
        r"Mixed_7c\.branch_pool\.bn\.bias is missing, expected \[192\]",
    ),
    "of another network": (
        lambda state: state | {"AuxLogits.fc.bias": torch.zeros(1000)},
        r"AuxLogits\.fc\.bias is \[1000\], which Inception does not have",
    ),
    "no state dict": (lambda state: torch.zeros(3), "neither Inception's weights"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_wrong_layout(name, weights, tmp_path):
    change, message = CHANGES[name]
    torch.save(change(weights[0].state_dict()), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=message):
        inception(tmp_path / "other.pth")


class Code:
    """A pickle that would run a command when it is read."""

    def __reduce__(self):
        return (exec, ("raise AssertionError('code of the file was run')",))


def test_weights_run_no_code(tmp_path):
    torch.save({"fc.bias": Code()}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="neither Inception's weights"):
        inception(tmp_path / "weights.pth")


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
    randomised(small_unet, 0).save_pretrained(tmp_path / "member")
    saved(tmp_path / "inception.pt")
    np.save(tmp_path / "images.npy", np.zeros((8, 1, 8, 8), dtype=np.uint8))
    arguments = ["evaluate", str(tmp_path / "member"), "--data", str(tmp_path / "images.npy")]
    arguments += ["--inception", str(tmp_path / "inception.pt"), "--samples", "40", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        main(arguments)
    assert "40 generated samples are too few" in capsys.readouterr().err


def test_too_few_for_inception():
    with pytest.raises(ValueError, match="needs at least 2049"):
        quality(torch.zeros(2048, 2048), torch.zeros(2100, 2048))
