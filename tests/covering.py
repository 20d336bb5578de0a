"""Of a product of parameters, the few combinations in which all pairs of values meet."""

import itertools
from collections import Counter
from collections.abc import Sequence


def covering(combinations: Sequence[tuple[int, ...]], strength: int) -> list[int]:
    """Numbers of combinations that hold every choice of ``strength`` values that any combination holds.

    Greedy: of those that hold the most that is missing, the first whose values were chosen least. Few faults need three
    parameters to meet (Kuhn, Wallace and Gallo, 2004): pairs find most of what the product does, at little of its cost.
    """

    def meetings(values: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
        return set(itertools.combinations(enumerate(values), min(strength, len(values))))

    def gain(i: int) -> tuple[int, int]:
        return len(held[i] & missing), -sum(uses[value] for value in enumerate(combinations[i]))

    held = [meetings(values) for values in combinations]
    missing, chosen, uses = set().union(*held), [], Counter[tuple[int, int]]()
    while missing:
        chosen.append(max(range(len(held)), key=gain))
        missing -= held[chosen[-1]]
        uses.update(enumerate(combinations[chosen[-1]]))
    return sorted(chosen)
