"""Anomaly scores: how unusual a model's denoising errors on an image are, over noise levels."""

from __future__ import annotations

import dataclasses

import numpy as np
from torch import Tensor

from fastens.evaluation.denoiser import Denoiser
from fastens.evaluation.loss import denoising_loss
from fastens.evaluation.quality import Interval


@dataclasses.dataclass(frozen=True)
class Anomaly:
    """How well scores tell outliers from inliers.

    Attributes:
        auroc: the probability that an outlier scores above an inlier, with a 95 % interval, by what is scored:
            ``"ensemble"``, the rule's denoising error; ``"member 0"``, ... alone; ``"variance"`` between members.
        scores: by the same names, of the inliers and of the outliers.
    """

    auroc: dict[str, Interval]
    scores: dict[str, tuple[np.ndarray, np.ndarray]]

    @property
    def single(self) -> Interval:
        """The AUROC of the median member; of an even number the lower of the two in the middle."""
        members = sorted((v for name, v in self.auroc.items() if name.startswith("member")), key=lambda v: v.value)
        return members[(len(members) - 1) // 2]


def anomaly(
    denoiser: Denoiser,
    reference: Tensor,
    inliers: Tensor,
    outliers: Tensor,
    *,
    times: Tensor | int = 10,
    draws: int = 1,
    batch_size: int = 512,
    seed: int = 0,
    data_range: tuple[float, float] = (-1.0, 1.0),
) -> Anomaly:
    """Score inliers and outliers by a model's denoising errors, against those on reference images.

    At each noise level the logarithm of the error is standardised by its mean and deviation over the reference; the
    score is the root mean square over levels, so that errors which are too small count as well (Graham et al.,
    "Denoising diffusion models for out-of-distribution detection", 2023, standardise reconstructions so). All images
    get noise of their own. One pass evaluates all members, and gives the variance between them too.

    Args:
        denoiser: of an ensemble, trained on images like the reference.
        reference: [R, ...] images that are usual, such as those it was trained on.
        inliers: [N, ...] others of that kind.
        outliers: [M, ...] images of another kind.
        times: as for :func:`denoising_loss`.
        draws: of noise at each level, averaged.
        batch_size: inputs in one pass.
        seed: of the noise, and of the intervals.
        data_range: what the images must lie in.

    Raises:
        TypeError: images that are no floating-point tensor.
        ValueError: images out of range or of different shapes; fewer than two reference images.
    """
    sets = {"reference": reference, "inliers": inliers, "outliers": outliers}
    for name, images in sets.items():
        if images.shape[1:] != reference.shape[1:]:
            raise ValueError(
                f"{name}: images are {list(images.shape[1:])}, and the reference {list(reference.shape[1:])}; expected "
                "one shape, which the model takes"
            )
    if len(reference) < 2:
        raise ValueError(f"reference: expected at least two images, got {len(reference)}")
    rule = denoiser.rule
    errors = []
    for number, images in enumerate(sets.values()):
        loss = denoising_loss(
            denoiser,
            images,
            rule_names=(rule,),
            times=times,
            draws=draws,
            batch_size=batch_size,
            seed=seed + number,
            data_range=data_range,
        )
        (by_rule,) = loss.rules.values()
        found = {"ensemble": by_rule, **{f"member {k}": each for k, each in enumerate(loss.members)}}
        errors.append(found if denoiser.num_members == 1 else {**found, "variance": loss.diversity})
    usual, *both = errors
    scores = {name: (_score(usual[name], both[0][name]), _score(usual[name], both[1][name])) for name in usual}
    return Anomaly({name: auroc(*pair, seed=seed) for name, pair in scores.items()}, scores)


def _score(reference: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Root mean square over levels of standardised log-errors, [N] of [N, L]."""
    usual, logs = (np.log(np.maximum(each, 1e-30)) for each in (reference, errors))
    return np.sqrt((((logs - usual.mean(0)) / np.maximum(usual.std(0), 1e-12)) ** 2).mean(1))


def auroc(inliers: np.ndarray, outliers: np.ndarray, draws: int = 1000, seed: int = 0) -> Interval:
    """The probability that an outlier's score is above an inlier's, ties by half, with a bootstrap interval of 95 %.

    Raises:
        ValueError: no inliers or no outliers.
    """
    if not len(inliers) or not len(outliers):
        raise ValueError(
            f"expected scores of both kinds, got {len(inliers)} of inliers and {len(outliers)} of outliers"
        )
    above = np.sign(outliers[:, None] - inliers[None]) / 2 + 0.5  # [M, N]
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(draws):  # both resampled: weights instead of copies
        m = np.bincount(generator.integers(len(outliers), size=len(outliers)), minlength=len(outliers))
        n = np.bincount(generator.integers(len(inliers), size=len(inliers)), minlength=len(inliers))
        values.append(m @ above @ n / (m.sum() * n.sum()))
    low, high = np.percentile(values, (2.5, 97.5))
    return Interval(float(above.mean()), float(low), float(high))
