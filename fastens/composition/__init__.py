"""Sums of scores: guidance, products, and what makes them true compositions of densities."""

from fastens.composition.composed import Composed, compose
from fastens.composition.superpose import Superposed, superpose
from fastens.composition.targets import And, Or
from fastens.composition.terms import Autoguided, Guided

__all__ = ["And", "Autoguided", "Composed", "Guided", "Or", "Superposed", "compose", "superpose"]
