"""The feature network of FID, from a local file: InceptionV3 as its 2015 weights have it."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastens.modes import evaluating

WIDTH = 2048
CLASSES = 1008
SIZE = 299
# Of each block: its input channels, its convolutions (output channels, kernel, stride), and the pooling of its last
# branch. Numbers after a branch's name are the order of its convolutions; "a" and "b" stand side by side.
Convolutions = dict[str, tuple[int, tuple[int, int], int]]


def _a(pooled: int) -> Convolutions:
    double = {f"branch3x3dbl_{i}": (n, (k, k), 1) for i, (n, k) in enumerate(((64, 1), (96, 3), (96, 3)), 1)}
    first = {"branch1x1": (64, (1, 1), 1), "branch5x5_1": (48, (1, 1), 1), "branch5x5_2": (64, (5, 5), 1)}
    return {**first, **double, "branch_pool": (pooled, (1, 1), 1)}


def _b() -> Convolutions:
    double = {"branch3x3dbl_1": (64, (1, 1), 1), "branch3x3dbl_2": (96, (3, 3), 1), "branch3x3dbl_3": (96, (3, 3), 2)}
    return {"branch3x3": (384, (3, 3), 2), **double}


def _c(inner: int) -> Convolutions:
    kernels = [(1, 1), (1, 7), (7, 1)], [(1, 1), (7, 1), (1, 7), (7, 1), (1, 7)]
    found: Convolutions = {"branch1x1": (192, (1, 1), 1)}
    for name, chain in zip(("branch7x7", "branch7x7dbl"), kernels, strict=True):
        for i, kernel in enumerate(chain, 1):
            found[f"{name}_{i}"] = (192 if i == len(chain) else inner, kernel, 1)
    return {**found, "branch_pool": (192, (1, 1), 1)}


def _d() -> Convolutions:
    found = {"branch3x3_1": (192, (1, 1), 1), "branch3x3_2": (320, (3, 3), 2)}
    for i, kernel in enumerate(((1, 1), (1, 7), (7, 1), (3, 3)), 1):
        found[f"branch7x7x3_{i}"] = (192, kernel, 2 if i == 4 else 1)
    return found


def _e() -> Convolutions:
    found: Convolutions = {"branch1x1": (320, (1, 1), 1), "branch3x3_1": (384, (1, 1), 1)}
    fork = {"a": (1, 3), "b": (3, 1)}
    found |= {f"branch3x3_2{side}": (384, kernel, 1) for side, kernel in fork.items()}
    found |= {"branch3x3dbl_1": (448, (1, 1), 1), "branch3x3dbl_2": (384, (3, 3), 1)}
    found |= {f"branch3x3dbl_3{side}": (384, kernel, 1) for side, kernel in fork.items()}
    return {**found, "branch_pool": (192, (1, 1), 1)}


BLOCKS: dict[str, tuple[int, Convolutions, str]] = {
    "Mixed_5b": (192, _a(32), "average"),
    "Mixed_5c": (256, _a(64), "average"),
    "Mixed_5d": (288, _a(64), "average"),
    "Mixed_6a": (288, _b(), "smaller"),
    "Mixed_6b": (768, _c(128), "average"),
    "Mixed_6c": (768, _c(160), "average"),
    "Mixed_6d": (768, _c(160), "average"),
    "Mixed_6e": (768, _c(192), "average"),
    "Mixed_7a": (768, _d(), "smaller"),
    "Mixed_7b": (1280, _e(), "average"),
    "Mixed_7c": (2048, _e(), "largest"),
}
STEM = {  # input and output channels, kernel, stride, padding
    "Conv2d_1a_3x3": (3, 32, 3, 2, 0),
    "Conv2d_2a_3x3": (32, 32, 3, 1, 0),
    "Conv2d_2b_3x3": (32, 64, 3, 1, 1),
    "Conv2d_3b_1x1": (64, 80, 1, 1, 0),
    "Conv2d_4a_3x3": (80, 192, 3, 1, 0),
}


class _Convolution(nn.Module):
    """A convolution, batch normalisation and ReLU."""

    def __init__(
        self, channels: int, out: int, kernel: int | tuple[int, int], stride: int, padding: int | tuple[int, int]
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class _Block(nn.Module):
    """Branches of convolutions beside each other, joined along the channels."""

    def __init__(self, channels: int, convolutions: Convolutions, pooling: str) -> None:
        super().__init__()
        self.pooling = pooling
        self.branches = [
            list(names) for _, names in groupby(convolutions, lambda name: name.rpartition("_")[0] or name)
        ]
        for names in self.branches:
            width = channels
            for name in names:
                out, (height, across), stride = convolutions[name]
                padding = (height // 2, across // 2) if stride == 1 else 0
                setattr(self, name, _Convolution(width, out, (height, across), stride, padding))
                width = width if name.endswith("a") else out  # "b" reads what "a" reads

    def _pooled(self, x: Tensor) -> Tensor:
        if self.pooling == "average":  # without the zeros around the image
            return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return F.max_pool2d(x, 3, 2) if self.pooling == "smaller" else F.max_pool2d(x, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for names in self.branches:
            h = self._pooled(x) if names == ["branch_pool"] else x
            sides = [name for name in names if name[-1] in "ab" and name[-2].isdigit()]
            for name in names[: len(names) - len(sides)]:
                h = getattr(self, name)(h)
            outputs += [getattr(self, name)(h) for name in sides] or [h]
        return torch.cat(outputs if self.pooling != "smaller" else [*outputs, self._pooled(x)], 1)


class Inception(nn.Module):
    """InceptionV3 (Szegedy et al., CVPR 2016) with the names and departures of the weights that FID is defined by.

    Images are brought to 299x299 bilinearly with antialiasing, as in torchmetrics.
    """

    def __init__(self) -> None:
        super().__init__()
        for name, settings in STEM.items():
            setattr(self, name, _Convolution(*settings))
        for name, block in BLOCKS.items():
            setattr(self, name, _Block(*block))
        self.fc = nn.Linear(WIDTH, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Features [B, 2048] of uint8 images [B, 3, H, W]."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"images are {images.dtype} {list(images.shape)}, expected torch.uint8 [B, 3, H, W]; repeat the "
                "channel of grey images, and scale to 0..255"
            )
        x = F.interpolate(images.float(), (SIZE, SIZE), mode="bilinear", align_corners=False, antialias=True)
        x = (x - 128) / 128
        for name in STEM:
            x = getattr(self, name)(x)
            if name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3"):
                x = F.max_pool2d(x, 3, 2)
        for name in BLOCKS:
            x = getattr(self, name)(x)
        return x.mean((2, 3))

    def logits(self, images: Tensor) -> Tensor:
        """Logits [B, 1008] without their bias, as the Inception score takes them."""
        return self(images) @ self.fc.weight.T


def inception(weights: str | Path) -> Callable[[Tensor], Tensor]:
    """The network of FID, InceptionV3 with 2048 features, from a local file; nothing is downloaded.

    Args:
        weights: torch-fidelity's file of weights (``weights-inception-2015-12-05-6726825d.pth``, also known as
            ``pt_inception-2015-12-05-6726825d.pth``), or a TorchScript of the network (``inception-2015-12-05.pt``).
            Code in a file of weights is not executed; a TorchScript is code.

    Returns:
        Maps uint8 images [B, 3, H, W] to features [B, 2048]; of a file of weights an :class:`Inception`, which gives
        logits too.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of something else, or a network of another width.
    """
    path = Path(weights)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; pass a file of Inception's weights, or its TorchScript")
    network = _scripted(path) or _from_weights(path)
    with torch.no_grad():
        found = network(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    if not isinstance(found, Tensor) or tuple(found.shape) != (2, WIDTH):
        shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"the network in {path} gives {shape} for 2 images, expected [2, {WIDTH}]: it is not FID's; "
            "judge samples by another network with features(network, images) and quality(...)"
        )
    return network


def _scripted(path: Path) -> Callable[[Tensor], Tensor] | None:
    """The TorchScript in a file; none where it holds something else."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            module = evaluating(torch.jit.load(str(path), map_location="cpu"))
        except RuntimeError:
            return None
    arguments = {argument.name for argument in module.forward.schema.arguments}
    options = {"return_features": True} if "return_features" in arguments else {}
    return lambda images: module(images, **options)


def _from_weights(path: Path) -> Inception:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError) as error:
        raise ValueError(f"{path} holds neither Inception's weights nor a TorchScript: {error}") from error
    with torch.device("meta"):
        network = Inception()
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    given = (
        {name: tuple(x.shape) for name, x in state.items() if isinstance(x, Tensor)} if isinstance(state, dict) else {}
    )
    optional = {name for name in wanted if name.endswith("num_batches_tracked")}
    wrong = [name for name in wanted if given.get(name, wanted[name] if name in optional else None) != wanted[name]]
    if wrong or set(given) - set(wanted):
        name = (wrong or sorted(set(given) - set(wanted)))[0]
        expected = f"expected {list(wanted[name])}" if name in wanted else "which Inception does not have"
        found = list(given[name]) if name in given else "missing"
        raise ValueError(
            f"{path} holds neither Inception's weights nor a TorchScript: {name} is {found}, {expected}; the file "
            "is torch-fidelity's weights-inception-2015-12-05-6726825d.pth"
        )
    state = {name: torch.zeros((), dtype=torch.int64) for name in optional} | state
    network.load_state_dict(state, assign=True)
    return evaluating(network.float().requires_grad_(False))
