"""What is evaluated: members, the data they are judged on, and the features that judge their samples."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastens.ensemble import Ensemble
from fastens.evaluation.classifier import Classifier, train_classifier
from fastens.evaluation.denoiser import Denoiser
from fastens.modes import evaluating
from fastens.parameterisation import resolve
from fastens.schedules import Discrete, Prediction, Schedule

BUNDLED = ("digits", "photographs")


@dataclasses.dataclass(frozen=True)
class Subject:
    """Members and data.

    Attributes:
        name: for the report.
        data: what the data are, in words.
        ensemble: of the members.
        schedule: that they were trained under.
        prediction: what they predict.
        fit: training rows, for the weights, [N, ...] in [-1, 1].
        test: held-out rows, [M, ...].
        levels: how many values a pixel takes.
        features: maps images [B, ...] to features [B, d]; none for no judgement of samples.
        logits: maps them to logits, for the Inception score.
        note: what the features are, or why there are none.
        dropout: a network that was trained with dropout, for MC Dropout; none for none.
        dropout_note: which network that is, or why there is none.
        checkpoints: the members' files.
    """

    name: str
    data: str
    ensemble: Ensemble
    schedule: Schedule
    prediction: str | Prediction
    fit: Tensor
    test: Tensor
    levels: int
    features: Callable[[Tensor], Tensor] | None
    logits: Callable[[Tensor], Tensor] | None
    note: str
    dropout: nn.Module | None
    dropout_note: str
    checkpoints: Sequence[Path]


def bundled(name: str) -> Subject:
    """The shipped members of ``"digits"`` or ``"photographs"`` with their data, and a classifier trained on it."""
    from fastens.checkpoints import load_members
    from fastens.demo import dropout_path, member_paths
    from fastens.demo.data import LOADERS, load_labels

    paths, path = member_paths(name), dropout_path(name)  # raise before a classifier is trained
    train, test = LOADERS[name]()
    labels, test_labels = load_labels(name)
    classifier = train_classifier(train, labels)
    with torch.no_grad():
        accuracy = float((classifier(test).argmax(1) == test_labels).double().mean())
    what = "hand-written digits, 8x8" if name == "digits" else "patches of two colour photographs, 16x16"
    return Subject(
        name=name,
        data=f"{what}, {len(train)} training and {len(test)} test images (scikit-learn)",
        ensemble=Ensemble(paths),
        schedule=Discrete.linear(),
        prediction="epsilon",
        fit=train,
        test=test,
        levels=17 if name == "digits" else 256,
        features=classifier.features,
        logits=classifier,
        note=f"features: the last {_width(classifier)} of a small classifier trained on the training images "
        f"({100 * accuracy:.1f} % of the test images right)",
        dropout=None if path is None else load_members([path])[0],
        dropout_note="no network with dropout ships for these images"
        if path is None
        else "a sixth network of the members' architecture, trained by the same script with --dropout 0.1",
        checkpoints=paths,
    )


def _width(classifier: Classifier) -> int:
    return classifier.head.in_features


def from_files(
    ensemble: Ensemble,
    checkpoints: Sequence[Path],
    data: Path,
    scheduler: Path | None,
    prediction: str | None,
    levels: int,
    weights: Path | None,
) -> Subject:
    """Your members, and an array of images.

    Args:
        ensemble: of the members.
        checkpoints: the members' files.
        data: ``.npy`` file [N, C, H, W], uint8, or floating point in [-1, 1]; the first half fits the weights, the
            second is held out.
        scheduler: folder of a diffusers scheduler; none for 1000 steps of linear beta.
        prediction: what the members predict; none for what the scheduler says, else epsilon.
        levels: how many values a pixel takes.
        weights: file of Inception weights, to judge samples with; none for no judgement.

    Raises:
        FileNotFoundError: a file or folder that does not exist.
        ValueError: an array of another kind, or a scheduler that is refused or contradicts ``prediction``.
    """
    images = images_in(data)
    schedule, predicted = path_of(scheduler, prediction)
    check_shape(Denoiser(ensemble, schedule, predicted), images[:1], data)
    half = len(images) // 2
    network, logits, note = _random_features(images, half)
    if weights is not None:
        from fastens.evaluation.inception import Inception, inception

        extract = inception(weights)
        network, note = (lambda x: extract(_bytes(x))), f"features: Inception's 2048, of {weights.name}"
        if isinstance(extract, Inception):
            logits = lambda x: extract.logits(_bytes(x))  # noqa: E731
    first = ensemble.members[0]
    drops = any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in first.modules())
    return Subject(
        name=data.stem,
        data=f"{data.name}, {half} images to fit weights on and {len(images) - half} held out",
        ensemble=ensemble,
        schedule=schedule,
        prediction=predicted,
        fit=images[:half],
        test=images[half:],
        levels=levels,
        features=network,
        logits=logits,
        note=note,
        dropout=first if drops else None,
        dropout_note="member 0" if drops else "the members have no dropout layer with p above 0",
        checkpoints=checkpoints,
    )


def images_in(data: Path) -> Tensor:
    """The images of a ``.npy`` file, [N, C, H, W] in [-1, 1].

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: an array of another kind.
    """
    if not data.is_file():
        raise FileNotFoundError(f"data {data} does not exist")
    try:
        array = np.load(data, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"data {data} is no .npy file: {error}") from error
    if array.ndim != 4 or len(array) < 4:
        raise ValueError(f"data {data} is {list(array.shape)}, expected images [N, C, H, W] with N >= 4")
    images = torch.from_numpy(array.astype(np.float32))
    return images / 127.5 - 1 if array.dtype == np.uint8 else images


def path_of(scheduler: Path | None, prediction: str | None) -> tuple[Schedule, Prediction]:
    """The noise schedule of members, and what they predict; 1000 steps of linear beta and epsilon by default.

    Raises:
        FileNotFoundError: a folder that does not exist.
        ValueError: a scheduler that is refused or contradicts ``prediction``.
    """
    said, _, schedule = resolve(prediction, None, Discrete.linear() if scheduler is None else scheduler_in(scheduler))
    assert schedule is not None
    return schedule, said.filled(kind="epsilon")


def check_shape(denoiser: Denoiser, image: Tensor, data: Path) -> None:
    """Raise ValueError where the members do not take images of this shape."""
    t = torch.tensor(0.5 * (denoiser.schedule.t_data + denoiser.schedule.t_prior), dtype=torch.float64)
    try:
        with torch.no_grad():
            denoiser.outputs(image.to(denoiser.device), t)
    except (RuntimeError, IndexError) as error:
        shape = list(image.shape[1:])
        raise ValueError(
            f"data {data} has images of {shape}, expected [C, H, W] as the members take them; images [H, W, C] are "
            f"transposed by array.transpose(0, 3, 1, 2). The members said: {str(error).splitlines()[0]}"
        ) from error


def _random_features(images: Tensor, half: int) -> tuple[Callable[[Tensor], Tensor] | None, None, str]:
    """Features of small images without weights to fetch; none, and why, where there are too few or larger images."""
    from fastens.evaluation.random_features import WIDTH, RandomFeatures

    if max(images.shape[2:]) > 64:
        return None, None, "no feature network was given (--inception FILE)"
    if half <= WIDTH:
        return None, None, f"{half} rows on each side are too few for {WIDTH} features"
    note = (
        f"features: {WIDTH} of a convolutional network with random weights (Naeem et al., ICML 2020), which "
        "compare samples of one data set and are no FID; --inception FILE takes FID's network"
    )
    return evaluating(RandomFeatures(images.shape[1])), None, note


def scheduler_in(folder: Path) -> Any:
    """The scheduler of a folder, of the class that its config names: another class would read it as its own."""
    import diffusers
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    path = folder / "scheduler_config.json"
    if not path.is_file():
        raise FileNotFoundError(f"scheduler {folder} has no scheduler_config.json")
    try:
        cls = getattr(diffusers, json.loads(path.read_text())["_class_name"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"scheduler {path} names no class of diffusers in _class_name: {error}") from error
    if not issubclass(cls, SchedulerMixin):
        raise ValueError(f"scheduler {path} names {cls.__name__} in _class_name, expected a scheduler")
    return cls.from_pretrained(folder, local_files_only=True)


def _bytes(images: Tensor) -> Tensor:
    """Images in [-1, 1] as uint8, three channels of a grey one."""
    pixels = ((images + 1) * 127.5).round().clamp(0, 255).byte()
    return pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels
