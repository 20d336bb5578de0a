"""Aggregation rules as values: what each rule is called, its parameters, its definition, and the randomness it needs.

A rule says how the scores of K members become one score (arXiv 2601.11444, section on aggregation). Rules compare
and hash by value, print as the expression that makes them, and pass through JSON:
``from_dict(rule.to_dict()) == rule``.
The fast arithmetic is in :func:`fastens.aggregate`; a rule of one's own is a function under :func:`fastens.rule`.
"""

from fastens.rules.alternating import Alternating
from fastens.rules.base import ALIASES, Rule
from fastens.rules.dominant import Dominant
from fastens.rules.function import rule
from fastens.rules.geometric import Geometric
from fastens.rules.max_abs import MaxAbs
from fastens.rules.mean import WEIGHT_SUM_TOLERANCE, Mean
from fastens.rules.median import Median
from fastens.rules.mixture import Mixture
from fastens.rules.noise_dependent_mean import NoiseDependentMean
from fastens.rules.product import Product
from fastens.rules.registry import RULES, from_dict, from_schema, get, names
from fastens.rules.sum import Sum

__all__ = [
    "ALIASES",
    "RULES",
    "WEIGHT_SUM_TOLERANCE",
    "Alternating",
    "Dominant",
    "Geometric",
    "MaxAbs",
    "Mean",
    "Median",
    "Mixture",
    "NoiseDependentMean",
    "Product",
    "Rule",
    "Sum",
    "from_dict",
    "from_schema",
    "get",
    "names",
    "rule",
]
