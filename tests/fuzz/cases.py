"""Cases by seed: what the command and the test both run."""

from random import Random

from tests.fuzz import changes  # noqa: F401 - registers its steps
from tests.fuzz.networks import Network, draw_network
from tests.fuzz.run import Case, Outcome, take
from tests.fuzz.sequences import STEPS, draw_steps


def draw_case(seed: int) -> Case:
    """The case of a seed."""
    engine = Random(f"engine {seed}").choices(["auto", "loop", "fold"], [92, 5, 3])[0]
    return Case(draw_network(seed), draw_steps(seed), engine)


def run_case(case: Case) -> Outcome:
    """Run one case."""
    return take(case, STEPS)


def read_case(text: str) -> Case:
    """The case that was printed as an expression."""
    return eval(text, {"__builtins__": {}, "Case": Case, "Network": Network})
