"""When are two scores better than one: loss, likelihood and sample quality of an ensemble (arXiv 2601.11444)."""

from fastens.evaluation.anomaly import Anomaly, anomaly, auroc
from fastens.evaluation.classes import ClassLikelihoods, class_log_likelihoods
from fastens.evaluation.denoiser import Denoiser
from fastens.evaluation.inception import inception
from fastens.evaluation.likelihood import Likelihood, bits_offset, likelihood
from fastens.evaluation.loss import DenoisingLoss, Estimate, denoising_loss, noise_levels
from fastens.evaluation.merging import MergeStudy, merge_loss, merge_study
from fastens.evaluation.quality import Interval, Quality, features, quality
from fastens.evaluation.sampling import sample
from fastens.evaluation.weights import fit_weights, held_out_gain, weighted_loss

__all__ = [
    "Anomaly",
    "ClassLikelihoods",
    "Denoiser",
    "DenoisingLoss",
    "Estimate",
    "Interval",
    "Likelihood",
    "MergeStudy",
    "Quality",
    "anomaly",
    "auroc",
    "bits_offset",
    "class_log_likelihoods",
    "denoising_loss",
    "features",
    "fit_weights",
    "held_out_gain",
    "inception",
    "likelihood",
    "merge_loss",
    "merge_study",
    "noise_levels",
    "quality",
    "sample",
    "weighted_loss",
]
