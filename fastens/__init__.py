"""Ensembles of score models, evaluated in one folded forward pass (arXiv 2601.11444)."""

import importlib
from typing import TYPE_CHECKING, Any

from fastens import rules, schedules
from fastens._version import __version__
from fastens.dropout import MCDropout
from fastens.engine.arguments import PerMember
from fastens.ensemble import Ensemble
from fastens.laplace import laplace
from fastens.network.registry import register_layer
from fastens.ops.aggregate import aggregate
from fastens.report import backends
from fastens.reproducible import deterministic
from fastens.rules import rule

if TYPE_CHECKING:
    from fastens import composition, demo, evaluation, interop, samplers, schemes, tabular, training, uncertainty
    from fastens.checkpoints import load_members
    from fastens.distributed.spreading import distribute
    from fastens.merging import merge
    from fastens.runs import sample_members
    from fastens.tabular.forest import Forest

__all__ = [
    "Ensemble",
    "Forest",
    "MCDropout",
    "PerMember",
    "__version__",
    "aggregate",
    "backends",
    "composition",
    "demo",
    "deterministic",
    "distribute",
    "evaluation",
    "interop",
    "laplace",
    "load_members",
    "merge",
    "register_layer",
    "rule",
    "rules",
    "sample_members",
    "samplers",
    "schedules",
    "schemes",
    "tabular",
    "training",
    "uncertainty",
]

_MODULES = frozenset(
    ("composition", "demo", "evaluation", "interop", "samplers", "schemes", "tabular", "training", "uncertainty")
)
_ATTRIBUTES = {
    "Forest": "fastens.tabular.forest",
    "distribute": "fastens.distributed.spreading",
    "load_members": "fastens.checkpoints",
    "merge": "fastens.merging",
    "sample_members": "fastens.runs",
} | dict.fromkeys(
    # A saved diffusers pipeline looks these classes up here; none may import diffusers before that.
    ("ModelMixin", "DiffusersEnsemble", "DiffusersMCDropout"),
    "fastens.interop.diffusers",
)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"fastens.{name}")
    if name in _ATTRIBUTES:
        return getattr(importlib.import_module(_ATTRIBUTES[name]), name)
    raise AttributeError(f"module 'fastens' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
