"""When are two scores better than one: loss, likelihood, sample quality and diversity of an ensemble (arXiv 2601.11444)."""

from fastens.evaluation.denoiser import Denoiser
from fastens.evaluation.likelihood import Likelihood, bits_offset, likelihood
from fastens.evaluation.loss import DenoisingLoss, Estimate, denoising_loss, noise_levels

__all__ = [
    "Denoiser",
    "DenoisingLoss",
    "Estimate",
    "Likelihood",
    "bits_offset",
    "denoising_loss",
    "likelihood",
    "noise_levels",
]
