"""Random networks, their rows assigned to members at random: ``python -m tests.fuzz.assigned 0 1000``.

Assignments come in any order, leave members out and repeat them; batches are guided or not, arguments each member's own
or not, and beside the scope there are others. Each row must be what a loop over the members gives for it.
"""

import contextlib
import copy
import dataclasses
import threading
import warnings
from random import Random
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

import fastens
from tests.fuzz import oracle
from tests.fuzz.draws import alone
from tests.fuzz.inputs import Call, copied, draw_form, make_call
from tests.fuzz.networks import Network, draw_network, members_of
from tests.fuzz.run import deliberate
from tests.fuzz.tally import print_tally

CALLS = 4


@dataclasses.dataclass
class Assigned:
    """One call: the member of each row of a sample, the call of each member, and how the scope is entered."""

    members: list[int]
    calls: list[Call]  # of each member; they differ where arguments are each member's own
    given: Call
    scope: dict[str, Any]


def draw(seed: int) -> tuple[Network, dict[str, Any], Random]:
    """A network whose batch is in front, how its ensemble is made, and what draws the calls."""
    chance = Random(f"assigned {seed}")
    dtype = chance.choices(["float32", "float64", "bfloat16"], [3, 3, 1])[0]
    spec = dataclasses.replace(draw_network(seed), dtype=dtype, batch_second=False)
    if spec.context == "bank":  # whose size may be that of the batch by chance
        spec = dataclasses.replace(spec, context="none")
    made = {"max_fold": chance.choice([None, None, None, 1, 3]), "engine": chance.choice(["auto"] * 5 + ["loop"])}
    return spec, made, chance


def draw_call(spec: Network, chance: Random, rows: int, times: int) -> Assigned:
    """Draw an assignment of ``rows`` samples and a call of ``times`` as many rows."""
    count = spec.members
    some = chance.sample(range(count), chance.randint(1, count))
    members = [chance.choice(some) for _ in range(rows)]
    if chance.random() < 0.3:
        members.sort(reverse=chance.random() < 0.5)
    form = dataclasses.replace(draw_form(spec, chance, rows * times), layout=chance.choice(["plain", "channels_last"]))
    given = make_call(spec, form, chance.randrange(2**30), spec.torch_dtype)
    flat, structure = pytree.tree_flatten(given)
    own = [list(flat) for _ in range(count)]
    for i, x in enumerate(flat[1:], 1):
        if isinstance(x, Tensor) and x.is_floating_point() and chance.random() < 0.3:
            values = [x + 0.1 * k for k in range(count)]
            flat[i] = fastens.PerMember(values)
            for k in range(count):
                own[k][i] = values[k]
    scope: dict[str, Any] = {"guidance": chance.choice([None, times])}
    return Assigned(
        members, [pytree.tree_unflatten(x, structure) for x in own], pytree.tree_unflatten(flat, structure), scope
    )


def expected(members: list[Any], one: Assigned, rows: int, mixing: bool) -> list[list[Any]]:
    """What each member gives for the whole batch; where rows are mixed, for each row alone too."""
    found = []
    for k, (member, call) in enumerate(zip(members, one.calls, strict=True)):
        if k not in one.members:  # it is not called, and remembers nothing
            found.append([])
            continue
        args, kwargs = copied(call)
        before = copy.deepcopy(member)
        found.append([member(*args, **kwargs)])
        if mixing:
            found[-1].append(alone(before, call, rows))
    return found


def check(answer: Any, candidates: list[list[Any]], members: list[int], relative: float) -> None:
    """Raise Mismatch unless each row is its member's."""
    leaves = pytree.tree_leaves(answer)
    for row in range(len(members)):
        options = candidates[members[row]]
        close = [_close(leaves, pytree.tree_leaves(option), row, relative) for option in options]
        if not any(close):
            raise oracle.Mismatch(f"row {row} is not that of member {members[row]}")


def _close(ours: list[Any], theirs: list[Any], row: int, relative: float) -> bool:
    for a, b in zip(ours, theirs, strict=True):
        if not oracle.is_score(b) or not bool(b.isfinite().all()):  # half precision overflows in some networks
            continue
        if a.shape != b.shape:
            return False
        allowed = relative * max(float(b.detach().abs().max()), oracle.FLOOR)
        if not float((a[row].detach().double() - b[row].detach().double()).abs().max()) <= allowed:
            return False
    return True


def outcome(seed: int) -> str:
    """What became of a network: ``same``, why it was refused, or that members do not run.

    Raises:
        AssertionError: a row is not its member's, or a scope was left behind.
    """
    spec, made, chance = draw(seed)
    members = members_of(spec)
    random, stateful, mixing = (spec.tagged(tag, spec.training) for tag in ("random", "stateful", "mixing"))
    if random:
        return "draws random numbers"
    rows, times = spec.rows, chance.choice([1, 1, 2, 3])
    calls = [draw_call(spec, chance, rows, times) for _ in range(CALLS)]
    relative = oracle.tolerance(spec.torch_dtype)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that members are looped
        ensemble = fastens.Ensemble(members_of(spec), **made)
        other = fastens.Ensemble(members_of(spec))
        for number, one in enumerate(calls):
            where = f"seed {seed}, call {number}, members {one.members} x{times}, {made}: {spec}"
            try:
                candidates = expected(members, one, rows * times, mixing)
            except Exception as error:
                return f"no call of a member: {type(error).__name__}"
            args, kwargs = copied(one.given)
            asked = ensemble.with_rule("median") if chance.random() < 0.2 else ensemble
            try:
                with contextlib.ExitStack() as scopes:
                    scopes.enter_context(ensemble.assigned(one.members, **one.scope))
                    if chance.random() < 0.3:
                        scopes.enter_context(other.assigned([0]))
                    if chance.random() < 0.2:
                        scopes.enter_context(ensemble.trajectory(rows, 0))
                    if chance.random() < 0.2:
                        scopes.enter_context(torch.inference_mode())
                    answer = asked(*args, **kwargs)
            except Exception as error:
                if not deliberate(error):
                    raise AssertionError(f"{type(error).__name__}: {error} in {where}") from error
                return f"refused: {str(error)[:50]}"
            try:
                check(answer, candidates, one.members * times, relative)
            except oracle.Mismatch as fault:
                raise AssertionError(f"{fault} in {where}") from fault
            assert ensemble._draws.assignment() is None
        if not stateful:
            _in_threads(ensemble, members, calls, (times, rows, mixing, relative), f"seed {seed}, threads: {spec}")
    return f"same, {'planned' if ensemble.report().plans else ensemble.engine}"


def _in_threads(
    ensemble: Any, members: list[Any], calls: list[Assigned], sizes: tuple[int, int, bool, float], where: str
) -> None:
    times, rows, mixing, relative = sizes
    faults: list[BaseException] = []
    candidates = [expected([copy.deepcopy(m) for m in members], one, rows * times, mixing) for one in calls]
    start = threading.Barrier(len(calls))

    def work(one: Assigned, options: list[list[Any]]) -> None:
        try:
            start.wait()
            with torch.no_grad(), ensemble.assigned(one.members, **one.scope):
                for _ in range(2):
                    args, kwargs = copied(one.given)
                    check(ensemble(*args, **kwargs), options, one.members * times, relative)
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=each) for each in zip(calls, candidates, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults and not deliberate(faults[0]):
        raise AssertionError(f"{type(faults[0]).__name__}: {faults[0]} in {where}") from faults[0]


if __name__ == "__main__":
    print_tally(outcome, "fault")
