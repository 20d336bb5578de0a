"""What the op suite runs over: every registered op with sample arguments, found by the name in the registry."""

from dataclasses import dataclass
from typing import Any

import torch

from fastens import rules
from fastens.reference import aggregate, draw_members, member_variance

DEVICE_KERNELS = ("native",)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
COUNTS = (1, 2, 3, 5, 8, 16, 17, 33)
RULES = (
    rules.Mean(),
    rules.Sum(),
    rules.Median(),
    rules.Median("lower"),
    rules.Geometric(),
    rules.Geometric("batch", 1e-3),
    rules.Dominant(),
    rules.MaxAbs(),
    rules.Alternating(),
)


@dataclass(frozen=True)
class Case:
    """One way to call a reduction over members: the arguments after the scores, and what they mean."""

    op: str
    name: str
    arguments: tuple[Any, ...]
    reference: Any

    def __str__(self):
        return f"{self.op}-{self.name}"


def reduction_cases(num_members):
    weights = torch.arange(1, num_members + 1, dtype=torch.float64)
    weighted = rules.Mean(tuple((weights / weights.sum()).tolist()))
    cases = [
        Case(
            "aggregate",
            "-".join(filter(None, (rule.name, rule.option, "weighted" if rule is weighted else ""))),
            (rule.name, rule.option, list(rule.values), 11, 3),
            lambda scores, rule=rule: aggregate.aggregate(scores, rule, seed=11, offset=3),
        )
        for rule in (*RULES, weighted)
    ]
    return [*cases, Case("member_variance", "", (), member_variance.member_variance)]


def draws(*arguments):
    return draw_members.draw_members(*arguments)
