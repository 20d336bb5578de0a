"""Ensembles of score models, evaluated in one folded forward pass (arXiv 2601.11444)."""

from typing import Any

from fastens import rules
from fastens._version import __version__
from fastens.checkpoints import load_members
from fastens.dropout import MCDropout
from fastens.ensemble import Ensemble
from fastens.fold.arguments import PerMember
from fastens.fold.registry import register_layer
from fastens.laplace import laplace
from fastens.ops.aggregate import aggregate
from fastens.report import backends
from fastens.tabular.forest import Forest

__all__ = [
    "Ensemble",
    "Forest",
    "MCDropout",
    "PerMember",
    "__version__",
    "aggregate",
    "backends",
    "laplace",
    "load_members",
    "register_layer",
    "rules",
]


def __getattr__(name: str) -> Any:
    # A saved diffusers pipeline looks these classes up here; none may import diffusers before that.
    if name in ("ModelMixin", "DiffusersEnsemble", "DiffusersMCDropout"):
        from fastens.interop import diffusers

        return getattr(diffusers, name)
    raise AttributeError(f"module 'fastens' has no attribute {name!r}")
