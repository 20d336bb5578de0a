"""Tabular data: forests as ensembles of scores, and ForestDiffusion with any aggregation rule."""

from fastens.tabular.drop_in import accelerate
from fastens.tabular.forest import Forest

__all__ = ["Forest", "accelerate"]
