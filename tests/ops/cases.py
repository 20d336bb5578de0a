"""What the op suite runs over: every registered op with sample arguments, found by the name in the registry."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from fastens import _native, rules
from fastens.ops._dispatch import missing_triton
from fastens.reference import aggregate, draw_members, member_variance

# Kernels that a CPU can run: the compiled ones, and Triton's in its interpreter.
NO_TRITON = missing_triton(torch.device("cpu"))
needs_native = pytest.mark.skipif(not _native.load(), reason=f"no compiled library: {_native.status()}")
needs_triton = pytest.mark.skipif(NO_TRITON is not None, reason=f"no Triton on the CPU: {NO_TRITON}")
KERNELS = (pytest.param("native", marks=needs_native), pytest.param("triton", marks=needs_triton))
BACKENDS = ("reference", *KERNELS)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
interpreted = pytest.mark.interpreted  # another dtype of what is interpreted in one: `make test-interpreted`
SHAPES = ((3, 5), (1,), (2, 3, 7, 37), (4, 1300))
FEW = {  # dtype -> numbers of members and shapes that the interpreter runs in a second
    torch.float32: ((1, 5, 17), ((3, 5),)),
    torch.float64: ((2, 8), ((1,),)),
    torch.bfloat16: ((3, 8), ((2, 3, 7),)),
    torch.float16: ((2, 5), ((3, 37),)),
}
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
