"""Cases by seed: what the command and the test both run."""

from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import fastens
from tests.fuzz import changes, contents, draws, oracle, surface, transforms  # noqa: F401 - they register their steps
from tests.fuzz.networks import Network, draw_network
from tests.fuzz.plain import Rounded
from tests.fuzz.rounding import SMALL, WITNESS
from tests.fuzz.run import Case, Fault, Outcome, take
from tests.fuzz.sequences import STEPS, draw_steps


def draw_case(seed: int, length: int | None = None, samplers: int = 0) -> Case:
    """The case of a seed; see :func:`draw_steps` for the others."""
    engine = Random(f"engine {seed}").choices(["auto", "loop", "fold"], [92, 5, 3])[0]
    network, draw = draw_network(seed), Random(f"options {seed}")
    most = draw.choice([1, network.rows, 2 * network.rows]) if draw.random() < 0.06 else None
    built = "inference" if draw.random() < 0.02 else "plain"
    return Case(network, draw_steps(seed, length, samplers), engine, most, built)


def run_case(case: Case, make: Callable[..., Any] = fastens.Ensemble) -> Outcome:
    """Run one case on an ensemble of its members; see :func:`only_rounding` for what is no fault."""
    outcome = take(case, STEPS, make)
    fault = outcome.fault
    if fault is not None and fault.outcome == "wrong" and make is not Rounded and only_rounding(case, fault, make):
        outcome.fault, outcome.magnified = None, fault
    return outcome


def only_rounding(case: Case, fault: Fault, make: Callable[..., Any]) -> bool:
    """Whether a difference is one of roundings, which the network magnifies.

    It is where the loop with another rounding shows one of its size: batch norm of two rows in training, for one,
    magnifies rounding a thousandfold, and the gradient of a group norm of two numbers is nothing but rounding. A large
    one has its witness in the same step; a small one may have one that the tolerances pass. Gradients that cancel may
    have none: such a case has to be right in float64. Where float64 is off in the same step, by its own far smaller
    rounding, there is nothing to hold float32 against.
    """
    small = fault.size < SMALL
    for share in (1.0, 1 / WITNESS) if small else (1.0,):
        with oracle.finer(share):
            same = take(case, STEPS, Rounded).fault
        if same is not None and fault.size < WITNESS * same.size < float("inf") and (small or same.step == fault.step):
            return True
    if not fault.trained or case.network.dtype == "float64":
        return False
    precise = take(replace(case, network=replace(case.network, dtype="float64")), STEPS, make).fault
    return small if precise is None else precise.step == fault.step and precise.size < 1e-4 * fault.size


def read_case(text: str) -> Case:
    """The case that was printed as an expression."""
    return eval(text, {"__builtins__": {}, "Case": Case, "Network": Network})
