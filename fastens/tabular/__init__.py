"""Tabular data: forests as ensembles of scores, and ForestDiffusion with any aggregation rule."""

from typing import TYPE_CHECKING, Any

from fastens.tabular.drop_in import accelerate
from fastens.tabular.forest import Forest

if TYPE_CHECKING:
    from fastens.tabular.forest_diffusion import ForestDiffusion

__all__ = ["Forest", "ForestDiffusion", "accelerate"]


def __getattr__(name: str) -> Any:
    if name == "ForestDiffusion":  # imports scikit-learn and pandas
        from fastens.tabular.forest_diffusion import ForestDiffusion

        return ForestDiffusion
    raise AttributeError(f"module 'fastens.tabular' has no attribute {name!r}")
