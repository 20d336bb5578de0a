"""Of a product of parameters, the few combinations in which all pairs of values meet."""

import itertools
from collections.abc import Sequence


def covering(combinations: Sequence[tuple[int, ...]], strength: int) -> list[int]:
    """Numbers of combinations that hold every choice of ``strength`` values that any combination holds.

    Greedy: the first of those that hold the most that is missing. Few faults need three parameters to meet (Kuhn,
    Wallace and Gallo, 2004), so pairs find most of what the product does, in a fraction of its time.
    """

    def meetings(values: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
        return set(itertools.combinations(enumerate(values), min(strength, len(values))))

    held = [meetings(values) for values in combinations]
    missing, chosen = set().union(*held), []
    while missing:
        chosen.append(max(range(len(held)), key=lambda i: len(held[i] & missing)))
        missing -= held[chosen[-1]]
    return sorted(chosen)
