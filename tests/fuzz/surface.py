"""Steps on what else an ensemble offers: members on demand, arguments of each member, training, files, MC Dropout."""

import copy
import tempfile
from random import Random
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

import fastens
from fastens.training import training_step
from tests.fuzz import oracle
from tests.fuzz.changes import OPTIMIZERS, again
from tests.fuzz.draws import ambiguous
from tests.fuzz.inputs import Form, copied
from tests.fuzz.networks import build
from tests.fuzz.oracle import Mismatch
from tests.fuzz.run import Run
from tests.fuzz.sequences import step


def untouched(member: nn.Module) -> nn.Module:
    """A copy that is called in a member's place, where it must not remember the call."""
    return copy.deepcopy(member)


@step(0.7)
def members_on_demand(run: Run, draw: Random) -> None:
    """Each of ``ens.members`` answers as the member that it stands for, and is a copy of it."""
    if run.random:
        return
    call = run.make(draw, Form(run.spec.rows))
    with torch.no_grad():
        expected = run.loop(lambda member: untouched(member)(*copied(call)[0], **copied(call)[1]))
        for k, output in enumerate(expected):
            run.attempt(
                lambda k=k: run.ensemble.members[k](*copied(call)[0], **copied(call)[1]),
                lambda answer, output=output: oracle.check(answer, output, oracle.tolerance(run.coarsest)),
            )


@step(1)
def per_member(run: Run, draw: Random) -> None:
    """An input, or a time, that every member has of its own."""
    make: Any = getattr(fastens, "PerMember", None)
    if make is None or run.random:
        return
    calls = [run.make(draw, Form(run.spec.rows)) for _ in run.members]
    which = draw.choice([(0,), (1,), (0, 1)])
    args = [make([call[0][i] for call in calls]) if i in which else a for i, a in enumerate(calls[0][0])]

    def own(k: int) -> list[Any]:
        return [calls[k][0][i] if i in which else a for i, a in enumerate(calls[0][0])]

    with torch.no_grad():
        expected = run.own(lambda: [m(*copied((own(k), {}))[0]) for k, m in enumerate(run.members)])
        run.outcome.calls += 1
        run.attempt(lambda: run.ensemble(*args), lambda answer: run.compare(answer, expected))
        run.call(calls[0])


@step(0.7)
def assigned(run: Run, draw: Random) -> None:
    """Rows that are given their members."""
    if not hasattr(run.ensemble, "assigned") or run.random or run.remembers_draws or ambiguous(run):
        return
    rows, count = run.spec.rows, run.spec.members
    run.allowed = run.allowed or run.mixing
    call = run.make(draw, Form(rows))

    def answered(member: nn.Module) -> Any:
        return member(*copied(call)[0], **copied(call)[1])

    for _ in range(2):
        to = torch.tensor([draw.randrange(count) for _ in range(rows)])

        with torch.no_grad():
            expected = run.own(
                lambda to=to: [answered(m if k in to else untouched(m)) for k, m in enumerate(run.members)]
            )

        def evaluate(to: torch.Tensor = to) -> Any:
            with run.ensemble.assigned(to):
                return run.ensemble(*copied(call)[0], **copied(call)[1])

        def check(answer: Any, to: torch.Tensor = to, expected: Any = expected) -> None:
            found = oracle.check_drawn(answer, [[output] for output in expected], 0, oracle.tolerance(run.coarsest))
            if any(int(k) not in members for k, members in zip(to, found, strict=True)):
                raise Mismatch("a row is not its member's")

        run.outcome.calls += 1
        with torch.no_grad():
            run.attempt(evaluate, check)
    with torch.no_grad():
        run.call(call)


@step(1)
def trained(run: Run, draw: Random) -> None:
    """A step of training, each member on a batch of its own, between calls of one signature."""
    spec = run.spec
    if run.random or spec.output != "tensor" or ambiguous(run) or not isinstance(run.ensemble, fastens.Ensemble):
        return
    if not any(p.requires_grad for p in run.members[0].parameters()):
        return
    name = draw.choice(list(OPTIMIZERS))
    run.step += f" ({name})"
    run.trained = True
    calls = [run.make(draw, Form(spec.rows)) for _ in run.members]
    together = pytree.tree_map(lambda *own: torch.stack(own), *[call[0] for call in calls])

    def each() -> None:
        trained = [[p for p in member.parameters() if p.requires_grad] for member in run.members]
        made = [OPTIMIZERS[name](parameters) for parameters in trained]
        for member, optimizer, call in zip(run.members, made, calls, strict=True):
            optimizer.zero_grad()
            with torch.enable_grad():
                member(*copied(call)[0]).square().mean().backward()
        for same in zip(*trained, strict=True):
            for p in same if any(p.grad is not None for p in same) else ():
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # as a stack has it; training_step warns
        for optimizer in made:
            optimizer.step()
            optimizer.zero_grad()

    def change() -> None:
        run.own(each)
        made = OPTIMIZERS[name]([p for p in run.ensemble.parameters() if p.requires_grad])
        with torch.enable_grad():
            run.attempt(lambda: training_step(run.ensemble, made, lambda y: y.square(), *together))
        made.zero_grad()

    again(run, draw, change)


@step(0.4)
def saved(run: Run, draw: Random) -> None:
    """Written to files, and read again in the ensemble's place."""
    run.allowed = run.allowed or run.spec.tagged("own_python") or run.random or run.stateful
    if not isinstance(run.ensemble, fastens.Ensemble):
        return

    def write_and_read() -> Any:
        with tempfile.TemporaryDirectory() as folder:
            run.ensemble.save_pretrained(folder)
            return type(run.ensemble).from_pretrained(folder, lambda: build(run.spec, 0))

    learns = {name: p.requires_grad for name, p in build(run.spec, 0).named_parameters()}  # a file does not say
    untied = learns.keys() != dict(run.members[0].named_parameters()).keys()  # by load_state_dict(assign=True)
    if run.altered or untied or run.dtype != run.spec.torch_dtype or run.spec.tagged("stateful", True):
        return  # what a factory makes is not what the members have become
    run.attempt(write_and_read, run._adopt)

    def as_built(module: torch.nn.Module) -> None:
        for name, p in module.named_parameters():
            p.requires_grad_(learns[name.removeprefix("network.")])

    run.each(as_built)
    run.each(lambda module: module.train(run.training))
    with torch.no_grad():
        run.call(run.make(draw, Form(run.spec.rows)))


DROPS = ("Dropout", "OptionalDropout", "TransformerLayer", "ResidualBlock")


@step(1)
def dropout(run: Run, draw: Random) -> None:
    """MC Dropout of member 0: fixed masks stay, differ between members, and are those of the loop."""
    spec = run.spec
    if run.stateful or not any(name in DROPS for name, _ in spec.blocks) or spec.tagged("own_python"):
        return
    if any(name == "RandomDraws" for name, _ in spec.blocks):
        return
    run.allowed = True  # where the rows of a dropout are not to be found
    options = {"num_members": spec.members, "p": 0.3, "seed": draw.randrange(100)}
    model = run.members[0]
    relative = 10 * oracle.tolerance(run.coarsest)

    def one(s: Any) -> Any:
        return s.mean(0) if oracle.is_score(s) else s[0] if isinstance(s, torch.Tensor) else s

    def compare() -> None:
        folded = fastens.MCDropout(model, **options)
        looped = fastens.MCDropout(model, engine="loop", **options)
        for rows in (spec.rows, spec.rows, spec.rows + 1):
            call = run.make(draw, Form(rows))
            mine, theirs = (e.member_outputs(*copied(call)[0], **copied(call)[1]) for e in (folded, looped))
            oracle.check(mine, theirs, relative)
            again = folded.member_outputs(*copied(call)[0], **copied(call)[1])
            oracle.check(again, mine, relative)
            whole = folded(*copied(call)[0], **copied(call)[1])
            oracle.check(whole, pytree.tree_map(one, mine), relative)
            run.outcome.calls += 3

    with torch.no_grad():
        run.attempt(compare)
