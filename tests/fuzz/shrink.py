"""Makes a failing case small: drops features and steps, and simplifies the network, while the failure persists."""

from collections.abc import Callable, Iterator
from dataclasses import fields, replace

from tests.fuzz.networks import Network
from tests.fuzz.run import Case, Outcome


def kind(outcome: Outcome) -> str | None:
    """What must persist: the outcome, and for an error its class."""
    fault = outcome.fault
    if fault is None:
        return None
    return fault.outcome if fault.outcome == "wrong" else f"raised {fault.why.partition(':')[0]}"


def shrunk(case: Case, attempt: Callable[[Case], Outcome], budget: int = 200) -> Case:
    """The smallest case found that fails in the same way, within a number of attempts."""
    wanted = kind(attempt(case))
    progress = wanted is not None
    while progress and budget > 0:
        progress = False
        for smaller in _smaller(case):
            budget -= 1
            if kind(attempt(smaller)) == wanted:
                case, progress = smaller, True
                break
            if budget <= 0:
                break
    return case


def _smaller(case: Case) -> Iterator[Case]:
    steps, network = case.steps, case.network
    for n in (len(steps) // 2, 1):
        if n:
            for i in range(0, len(steps) - n + 1, n):
                yield replace(case, steps=steps[:i] + steps[i + n :])
    blocks = network.blocks
    for i in range(len(blocks)):
        yield replace(case, network=replace(network, blocks=blocks[:i] + blocks[i + 1 :]))
    plain = Network()
    for field in fields(Network):
        simplest = getattr(plain, field.name)
        current = getattr(network, field.name)
        if field.name in ("frame", "blocks", "seed") or current == simplest:
            continue
        if not isinstance(current, int) or isinstance(current, bool) or current > simplest:
            yield replace(case, network=replace(network, **{field.name: simplest}))
    for field in ("engine", "max_fold", "built"):
        if getattr(case, field) != getattr(Case(network), field):
            yield replace(case, **{field: getattr(Case(network), field)})


def source(case: Case) -> str:
    """The expression that makes a case, with nothing that is as by default."""
    plain = Network()
    said = [
        f"{f.name}={getattr(case.network, f.name)!r}"
        for f in fields(Network)
        if getattr(case.network, f.name) != getattr(plain, f.name)
    ]
    options = [
        f", {name}={getattr(case, name)!r}"
        for name in ("engine", "max_fold", "built")
        if getattr(case, name) != getattr(Case(plain), name)
    ]
    return f"Case(Network({', '.join(said)}), {case.steps!r}{''.join(options)})"
