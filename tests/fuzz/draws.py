"""Steps under rules that draw one member a row."""

import threading
from dataclasses import replace
from random import Random
from typing import Any

import torch
import torch.utils._pytree as pytree

from tests.fuzz import oracle
from tests.fuzz.inputs import Call, copied
from tests.fuzz.oracle import Mismatch
from tests.fuzz.plain import stacked
from tests.fuzz.run import Run
from tests.fuzz.sequences import step

Checked = list[tuple[Call, list[list[Any]]]]


def ambiguous(run: Run) -> bool:
    """Whether arguments and outputs leave open which of them carry rows, so that an error may say so."""
    return run.spec.batch_second or run.spec.output == "ids" or run.spec.context == "bank"


def prepared(run: Run, draw: Random, count: int, rows: int) -> Checked:
    """Calls, and what each member answers to them."""
    calls = []
    for _ in range(count):
        call = run.make(draw, replace(run.form(draw, rows), layout="plain"))
        args, kwargs = copied(call)
        candidates = [[output] for output in run.loop(lambda m, args=args, kwargs=kwargs: m(*args, **kwargs))]
        if run.mixing and not run.spec.batch_second:
            for options, other in zip(candidates, run.loop(lambda m, call=call: alone(m, call, rows)), strict=True):
                options.append(other)
        calls.append((call, candidates))
    return calls


def alone(member: Any, call: Call, rows: int) -> Any:
    """What a member answers to each row in a batch of its own, as one batch."""
    answers = []
    for row in range(rows):
        args, kwargs = pytree.tree_map(
            lambda a, row=row: a[row : row + 1] if torch.is_tensor(a) and a.shape[:1] == (rows,) else a, copied(call)
        )
        answers.append(member(*args, **kwargs))
    return pytree.tree_map(stacked, *answers)


def trajectory(run: Run, rule: str, rows: int, seed: int, calls: Checked) -> list[Any]:
    """One trajectory: every row is some member's, and under ``mixture`` the same member's all the way."""
    relative = oracle.tolerance(run.coarsest)
    seen = [set(range(run.spec.members)) for _ in range(rows)]
    answers = []
    with torch.no_grad(), run.ensemble.trajectory(rows, seed):
        for call, candidates in calls:
            args, kwargs = copied(call)
            answers.append(run.ensemble(*args, **kwargs))
            try:
                found = oracle.check_drawn(answers[-1], candidates, 0, relative)
            except Mismatch:  # a batch in dimension 1 may be found there, or its dimension 0 be taken for rows
                if not run.spec.batch_second:
                    raise
                found = oracle.check_drawn(answers[-1], candidates, 1, relative)
            for row, members in enumerate(found if rule == "mixture" else []):
                seen[row % rows] &= members
                if not seen[row % rows]:
                    raise Mismatch(f"row {row} changed its member within a trajectory")
    return answers


@step(1)
def drawn(run: Run, draw: Random) -> None:
    """Two trajectories of one seed, guided or not, then the rule as it was."""
    if run.random or run.stateful:
        return
    rule, before, rows = draw.choice(["alternating", "mixture"]), run.ensemble.rule, run.spec.rows
    seed = draw.randrange(1000)
    with torch.no_grad():
        calls = prepared(run, draw, 3, rows * draw.choice([1, 1, 2]))
    run.allowed = run.allowed or run.mixing or ambiguous(run)

    def twice() -> None:
        run.ensemble.rule = rule
        first, second = (trajectory(run, rule, rows, seed, calls) for _ in range(2))
        run.outcome.calls += 2 * len(calls)
        oracle.check(second, first, oracle.tolerance(run.coarsest))
        run.ensemble.rule = before

    run.attempt(twice)
    with torch.no_grad():
        run.call(run.make(draw))


@step(0.5)
def drawn_in_threads(run: Run, draw: Random) -> None:
    """Trajectories of several threads at once, each of its own seed and members."""
    if run.random or run.stateful:
        return
    rule, before, rows = draw.choice(["alternating", "mixture"]), run.ensemble.rule, run.spec.rows
    count = draw.choice([2, 4])
    with torch.no_grad():
        calls = [prepared(run, draw, 3, rows) for _ in range(count)]
    run.allowed = run.allowed or run.mixing or ambiguous(run)
    errors: list[BaseException] = []
    answers: dict[int, list[Any]] = {}
    start = threading.Barrier(count)

    def work(i: int) -> None:
        try:
            start.wait()
            answers[i] = trajectory(run, rule, rows, i, calls[i])
        except BaseException as error:
            errors.append(error)

    def together() -> None:
        run.ensemble.rule = rule
        workers = [threading.Thread(target=work, args=(i,)) for i in range(count)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        run.outcome.calls += 3 * count
        if errors:
            raise errors[0]
        for i, some in enumerate(calls):  # alone, a seed gives what it gave among others
            oracle.check(answers[i], trajectory(run, rule, rows, i, some), oracle.tolerance(run.coarsest))
        run.ensemble.rule = before

    run.attempt(together)
