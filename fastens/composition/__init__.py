"""Sums of scores: guidance, products, and what makes them true compositions of densities."""

from fastens.composition.composed import Composed, compose
from fastens.composition.terms import Autoguided, Guided

__all__ = ["Autoguided", "Composed", "Guided", "compose"]
