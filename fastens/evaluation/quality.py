"""Sample quality in the features of a network: Fréchet and kernel distance, Inception score, precision and recall."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate and a confidence interval from the bootstrap.

    Attributes:
        value: of all samples.
        low: lower end.
        high: upper end.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


@dataclasses.dataclass(frozen=True)
class Quality:
    """How near generated samples are to real ones.

    Attributes:
        frechet: Fréchet distance (FID with Inception's features).
        kernel: unbiased squared maximum mean discrepancy under the cubic kernel (KID).
        precision: share of generated samples in the real manifold.
        recall: share of real samples in the generated manifold.
        score: Inception score, where the network gives logits.
        generated: how many generated samples.
        real: how many real ones.
    """

    frechet: Interval
    kernel: Interval
    precision: float
    recall: float
    score: Interval | None
    generated: int
    real: int

    def _intervals(self) -> dict[str, Interval]:
        found = {"Fréchet distance": self.frechet, "kernel distance": self.kernel}
        return found if self.score is None else {**found, "Inception score": self.score}

    def summary(self) -> str:
        """Every measure with its interval, in a sentence."""
        said = [f"{name} {found}" for name, found in self._intervals().items()]
        said += [f"precision {self.precision:.3f}", f"recall {self.recall:.3f}"]
        return f"{', '.join(said)}; {self.generated} generated and {self.real} real samples"

    def to_frame(self) -> Any:
        """A pandas table: a row for each measure, with its interval where it has one."""
        import pandas as pd

        rows = {name: dataclasses.asdict(found) for name, found in self._intervals().items()}
        rows |= {"precision": {"value": self.precision}, "recall": {"value": self.recall}}
        return pd.DataFrame.from_dict(rows, orient="index", columns=["value", "low", "high"])

    def plot(self, axis: Any = None) -> Any:
        """Draw the distances with their intervals; the axes are returned."""
        import matplotlib.pyplot as plt

        axis = plt.subplots()[1] if axis is None else axis
        found = {"Fréchet": self.frechet, "kernel": self.kernel}
        for name, interval in found.items():
            error = [[interval.value - interval.low], [interval.high - interval.value]]
            axis.errorbar([name], [interval.value], error, fmt="o", capsize=3)
        axis.set(ylabel="distance (less is better)")
        return axis


@torch.no_grad()
def features(network: Callable[[Tensor], Tensor], images: Tensor | Iterable[Tensor], batch_size: int = 256) -> Tensor:
    """Features of images, computed batch by batch, so that the images need not be in memory together.

    Args:
        network: maps [B, ...] to [B, d]; logits give the Inception score besides.
        images: [N, ...], or batches of it.
        batch_size: images at a time, of a tensor.

    Returns:
        float32 [N, d] on the CPU.

    Raises:
        ValueError: a network that does not return [B, d], or no images.
    """
    found = []
    for batch in images.split(batch_size) if isinstance(images, Tensor) else images:
        vectors = network(batch)
        if not isinstance(vectors, Tensor) or vectors.ndim != 2 or len(vectors) != len(batch):
            shape = list(vectors.shape) if isinstance(vectors, Tensor) else type(vectors).__name__
            raise ValueError(
                f"the feature network returned {shape} for {len(batch)} images, expected [{len(batch)}, d]"
            )
        found.append(vectors.float().cpu())
    if not found:
        raise ValueError("no images to take features of")
    return torch.cat(found)


def quality(
    generated: Tensor,
    real: Tensor,
    *,
    logits: Tensor | None = None,
    resamples: int = 100,
    confidence: float = 0.95,
    neighbours: int = 5,
    subset_size: int = 1000,
    seed: int = 0,
) -> Quality:
    """Compare generated with real samples by their features.

    The Fréchet distance of a resample is biased upwards, so its interval is the estimate plus and minus the normal
    quantile times the standard deviation over resamples of the generated samples; the real ones stay as they are.

    Args:
        generated: features [N, d], see :func:`features`.
        real: features [M, d].
        logits: of the generated samples, [N, classes], for the Inception score.
        resamples: of the bootstrap.
        confidence: of the intervals.
        neighbours: k of precision and recall (Kynkäänniemi et al., NeurIPS 2019).
        subset_size: the most samples in one of the kernel distance's subsets.
        seed: of resamples and subsets.

    Raises:
        ModuleNotFoundError: torchmetrics is not installed.
        ValueError: features of different width, not finite, or of fewer samples than a covariance of that width needs,
            or than ``neighbours``.
    """
    for name, vectors in (("generated", generated), ("real", real)):
        if vectors.ndim != 2 or vectors.shape[1] != real.shape[-1]:
            raise ValueError(
                f"{name} features are {list(vectors.shape)}, expected [N, {real.shape[-1]}] as the real ones; take "
                "both from one feature network"
            )
        if not torch.isfinite(vectors).all():
            raise ValueError(f"{name} features are not all finite; look for such images, or samples that diverged")
        check_enough(name, len(vectors), vectors.shape[1])
        if not 1 <= neighbours < len(vectors):
            raise ValueError(f"neighbours is {neighbours}, expected 1 to {len(vectors) - 1} for {len(vectors)} samples")
    z = float(torch.special.ndtri(torch.tensor(0.5 + confidence / 2, dtype=torch.float64)))
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.default_generator.manual_seed(seed)  # torchmetrics permutes with it; those of GPUs are not forked here
        size = min(subset_size, len(generated), len(real))
        kernel, kernel_std = _kernel(generated, real, size)
        score = None if logits is None else _inception_score(logits)
    frechet = _frechet(generated, real)
    resampler = np.random.default_rng(seed)
    drawn = []
    for _ in range(resamples):
        index = torch.from_numpy(resampler.integers(0, len(generated), len(generated)))
        drawn.append(_frechet(generated[index], real))
    half = z * float(np.std(drawn, ddof=1)) if resamples > 1 else math.nan
    precision, recall = _precision_recall(generated.double(), real.double(), neighbours)
    return Quality(
        frechet=Interval(frechet, max(0.0, frechet - half), frechet + half),
        kernel=Interval(kernel, kernel - z * kernel_std, kernel + z * kernel_std),
        precision=precision,
        recall=recall,
        score=None if score is None else Interval(score[0], score[0] - z * score[1], score[0] + z * score[1]),
        generated=len(generated),
        real=len(real),
    )


def check_enough(name: str, samples: int, width: int) -> None:
    """Raise ValueError where so many samples do not determine the covariance of ``width`` features."""
    if samples <= width:
        raise ValueError(
            f"{samples} {name} samples are too few for the covariance of {width} features, which needs at least "
            f"{width + 1}; add samples, or take a narrower feature network"
        )


class _Given(nn.Module):
    """Stands for the feature network where features are given."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, x: Tensor) -> Tensor:
        return x


def _frechet(generated: Tensor, real: Tensor) -> float:
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(_Given(real.shape[1]))
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    return float(metric.compute())


def _kernel(generated: Tensor, real: Tensor, size: int) -> tuple[float, float]:
    """The kernel distance, and its standard error: a delete-d jackknife by subsets of half the size.

    Subsets of m of n samples vary, given these, by ``(n - m) / m`` times the variance of all n (Shao and Wu, "A general
    theory for jackknife variance estimation", 1989). A mean over subsets varies besides by which they are.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    least, half = min(len(generated), len(real)), max(2, size // 2)
    number = 1 if size == least else 50
    values = []
    for subsets, each in ((number, size), (50, half)):
        metric = KernelInceptionDistance(_Given(real.shape[1]), subsets=subsets, subset_size=each)
        metric.update(real.double(), real=True)
        metric.update(generated.double(), real=False)
        values.append([float(v) for v in metric.compute()])
    (value, between), (_, spread) = values
    return value, math.sqrt(spread**2 * half / max(1, least - half) + between**2 / number)


def _inception_score(logits: Tensor) -> tuple[float, float]:
    from torchmetrics.image.inception import InceptionScore

    metric = InceptionScore(nn.Identity(), splits=min(10, max(2, len(logits) // 50)))
    metric.update(logits)
    mean, std = metric.compute()
    return float(mean), float(std) / math.sqrt(metric.splits)


def _precision_recall(generated: Tensor, real: Tensor, k: int, chunk: int = 1024) -> tuple[float, float]:
    def radii(points: Tensor) -> Tensor:
        return torch.cat([torch.cdist(part, points).kthvalue(k + 1, 1).values for part in points.split(chunk)])

    def covered(points: Tensor, by: Tensor, radius: Tensor) -> float:
        inside = [(torch.cdist(part, by) <= radius).any(1) for part in points.split(chunk)]
        return float(torch.cat(inside).double().mean())

    return covered(generated, real, radii(real)), covered(real, generated, radii(generated))
