"""When are two scores better than one: loss, likelihood and sample quality of an ensemble (arXiv 2601.11444)."""

from fastens.evaluation.denoiser import Denoiser
from fastens.evaluation.inception import inception
from fastens.evaluation.likelihood import Likelihood, bits_offset, likelihood
from fastens.evaluation.loss import DenoisingLoss, Estimate, denoising_loss, noise_levels
from fastens.evaluation.quality import Interval, Quality, features, quality
from fastens.evaluation.sampling import sample
from fastens.evaluation.weights import fit_weights, held_out_gain, weighted_loss

__all__ = [
    "Denoiser",
    "DenoisingLoss",
    "Estimate",
    "Interval",
    "Likelihood",
    "Quality",
    "bits_offset",
    "denoising_loss",
    "features",
    "fit_weights",
    "held_out_gain",
    "inception",
    "likelihood",
    "noise_levels",
    "quality",
    "sample",
    "weighted_loss",
]
