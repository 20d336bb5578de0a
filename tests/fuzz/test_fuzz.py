"""Random networks under random calls: each answer is the loop's. ``python -m tests.fuzz`` runs many more."""

import pytest

from tests.fuzz import plain
from tests.fuzz.cases import SMALL, draw_case, read_case, run_case
from tests.fuzz.shrink import shrunk, source

GROUPS, EACH, LENGTH = 20, 5, 4


@pytest.mark.parametrize("group", range(GROUPS))
def test_the_ensemble_answers_as_the_loop(group):
    faults = []
    for seed in range(group * EACH, (group + 1) * EACH):
        outcome = run_case(draw_case(seed, LENGTH))
        if outcome.fault:
            small = source(shrunk(outcome.case, run_case, 0 if faults else 40))
            fault = outcome.fault
            faults.append(f"seed {seed}: {fault.outcome} in {fault.step}: {fault.why}\n  {small}")
    assert not faults, "\n" + "\n".join(faults)


@pytest.mark.parametrize("seed", range(5))
def test_a_printed_case_is_the_case(seed):
    case = draw_case(seed)
    assert read_case(source(case)) == case


@pytest.mark.parametrize("seed", range(20))
def test_the_loop_itself_has_no_fault(seed):
    """With another rounding too, so that no fault is one of the suite or of its tolerances."""
    for make in (plain.PlainLoop, plain.Rounded):
        fault = run_case(draw_case(seed), make).fault
        assert fault is None or (make is plain.Rounded and fault.size < SMALL)


PLANTED = (
    plain.MemberZeroForAll,
    plain.StaleWeights,
    plain.StaleTimes,
    plain.RowsApart,
    plain.KeepsWhatItReturns,
    plain.Unflagged,
)


@pytest.mark.parametrize("make", PLANTED, ids=lambda make: make.__name__)
def test_a_planted_fault_is_found(make):
    faults = (run_case(draw_case(seed), make).fault for seed in range(200))
    assert any(fault is not None and fault.outcome == "wrong" for fault in faults)
