"""Training: K members at once, and a student of an ensemble."""

from fastens.training.distillation import Distilled, distill, score_matching
from fastens.training.members import clip_member_grad_norms, member_forward, training_step
from fastens.training.optimizers import check_optimizer

__all__ = [
    "Distilled",
    "check_optimizer",
    "clip_member_grad_norms",
    "distill",
    "member_forward",
    "score_matching",
    "training_step",
]
