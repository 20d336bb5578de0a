"""Networks by number from a command line, START and STOP, and how often each outcome was theirs."""

import sys
from collections import Counter
from collections.abc import Callable


def print_tally(outcome: Callable[[int], str], otherwise: str) -> None:
    """Print every failed assertion, and how often each outcome was; ``otherwise`` is that of a failed one."""
    tally: Counter[str] = Counter()
    for number in range(*map(int, sys.argv[1:3])):
        try:
            tally[outcome(number)] += 1
        except AssertionError as fault:
            print(fault, flush=True)
            tally[otherwise] += 1
    for what, count in tally.most_common():
        print(count, what)
