"""What members disagree about: variances, distances, scores and calibration of their samples, and pictures of them.

Samples are [K, N, ...], as :func:`fastens.sample_members` gives them, N of each of K members; M = K N of them pooled
are [M, ...]. Arrays and tensors are taken alike, and what is returned is of the kind that was given, in float64.
"""

from fastens.uncertainty.measures import (
    Calibration,
    Sparsification,
    SpreadSkill,
    Variances,
    calibration,
    crps,
    decompose,
    disagreement,
    distances,
    rank_histogram,
    sparsification,
    spread_skill,
)
from fastens.uncertainty.plots import plot_maps, plot_rank_histogram, plot_sparsification

__all__ = [
    "Calibration",
    "Sparsification",
    "SpreadSkill",
    "Variances",
    "calibration",
    "crps",
    "decompose",
    "disagreement",
    "distances",
    "plot_maps",
    "plot_rank_histogram",
    "plot_sparsification",
    "rank_histogram",
    "sparsification",
    "spread_skill",
]
