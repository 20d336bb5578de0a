"""Random sequences of calls: other inputs, shapes, forms, aliasing, rules, modes, gradients and threads."""

import threading
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

import fastens
from tests.fuzz import oracle
from tests.fuzz.inputs import Form, batch, copied
from tests.fuzz.run import Run, spoil

STEPS: dict[str, Callable[[Run, Random], None]] = {}
SHARES: dict[str, float] = {}


def step(weight: float) -> Callable[[Callable[[Run, Random], None]], Callable[[Run, Random], None]]:
    """Register a step; its name is the function's."""

    def register(function: Callable[[Run, Random], None]) -> Callable[[Run, Random], None]:
        assert function.__name__ not in STEPS
        STEPS[function.__name__], SHARES[function.__name__] = function, weight
        return function

    return register


FIRST = ("threads", "gradients", "numbers", "autocast", "inference", "drawn", "functional", "degenerate", "enabled")


def draw_steps(seed: int, length: int | None = None, samplers: int = 0) -> tuple[tuple[str, int], ...]:
    """Draw a sequence, of so many steps; most begin as a sampler does, and some with what is rarely a first call.

    Args:
        seed: of the sequence.
        length: how many steps, three to eight where None.
        samplers: how many samplers run besides, anywhere among the steps.
    """
    draw = Random(f"steps {seed}")
    first = [draw.choice(FIRST)] if draw.random() < 0.3 else []
    count = draw.randrange(3, 9) if length is None else length
    names = [*first, "sample", *draw.choices(list(STEPS), list(SHARES.values()), k=count)]
    for _ in range(samplers):
        names.insert(draw.randrange(1, len(names) + 1), "sampler")
    return tuple((name, draw.randrange(10_000)) for name in names)


@step(4)
def sample(run: Run, draw: Random) -> None:
    """Three calls of one signature on other inputs, as a sampler makes them."""
    with torch.no_grad():
        for _ in range(3):
            run.call(run.make(draw, Form(run.spec.rows)))


@step(0.5)
def sampler(run: Run, draw: Random) -> None:
    """A sampler: many calls of one signature, each on what was made of the answer before.

    To its end where that runs a plan, which is audited at some of its calls; elsewhere each call is as the first.
    """
    (x, _, *context), _ = run.make(draw, Form(run.spec.rows))
    replaces, kept = draw.random() < 0.5, copied(((x,), {}))[0][0]

    def onwards(answer: Any) -> None:
        nonlocal x
        scores = [leaf for leaf in pytree.tree_leaves(answer) if oracle.is_score(leaf) and leaf.shape == x.shape]
        step = torch.tanh(scores[0] if scores else kept).to(x.dtype).nan_to_num()  # weights that ran away in training
        if replaces:
            x = x * 0.75 + step * 0.5
        else:
            x.mul_(0.75).add_(step, alpha=0.5)

    with torch.no_grad():
        for i in range(draw.choice([10, 25, 60, 200])):
            if i == 10 and isinstance(run.ensemble, fastens.Ensemble) and not run.ensemble.report().plans:
                break
            time = run.make(draw, Form(run.spec.rows))[0][1]
            run.call(((x, time, *context), {}), then=onwards)


@step(3)
def other_forms(run: Run, draw: Random) -> None:
    """Calls in other forms: layouts, times, flags, contexts by keyword or left out."""
    with torch.no_grad():
        form = run.form(draw)
        for _ in range(2):
            run.call(run.make(draw, form))
        run.call(run.make(draw))


@step(2)
def other_batches(run: Run, draw: Random) -> None:
    """Other numbers of rows, then the first again."""
    with torch.no_grad():
        for rows in (draw.choice([0, 1, 2, 3, 5, run.spec.members, run.spec.members * run.spec.rows]), run.spec.rows):
            run.call(run.make(draw, run.form(draw, rows)))


@step(1)
def numbers(run: Run, draw: Random) -> None:
    """Times that are other Python numbers at every call."""
    with torch.no_grad():
        for _ in range(5):
            run.call(run.make(draw, Form(run.spec.rows, time="number")))


@step(1)
def members_apart(run: Run, draw: Random) -> None:
    with torch.no_grad():
        call = run.make(draw)
        run.call(call, "members")
        run.call(call)


@step(1)
def with_variance(run: Run, draw: Random) -> None:
    with torch.no_grad():
        run.call(run.make(draw), "variance")


@step(1)
def rules(run: Run, draw: Random) -> None:
    """Another rule, set on the ensemble, for this and later calls."""
    run.rule = draw.choice(list(oracle.RULES))
    weighted = run.rule == "weighted" and isinstance(run.ensemble, fastens.Ensemble)
    rule = fastens.rules.Mean(oracle.weights(run.spec.members)) if weighted else run.rule
    run.attempt(lambda: setattr(run.ensemble, "rule", rule))
    with torch.no_grad():
        for _ in range(2):
            run.call(run.make(draw))


@step(1.5)
def aliased(run: Run, draw: Random) -> None:
    """One tensor as two arguments, then two; halves of one tensor; a tensor of zeros without memory."""
    rows, spec = run.spec.rows, run.spec
    first, second = run.make(draw, Form(rows)), run.make(draw, Form(rows))
    generator = torch.Generator().manual_seed(draw.randrange(2**30))
    dim = int(spec.batch_second)
    x, y = batch(spec, rows, generator, run.dtype), batch(spec, rows, generator, run.dtype)
    a, b = torch.cat([x, y], dim).chunk(2, dim)
    with torch.no_grad():
        if spec.context == "same":
            run.call(((x, first[0][1], x), {}))
            run.call(((x, first[0][1], y), {}))
            run.call(((a, first[0][1], b), {}))
            run.call(((b, first[0][1], a), {}))
        else:
            run.call(((a, *first[0][1:]), {}))
            run.call(((b, *second[0][1:]), {}))
        zeros = torch._efficientzerotensor(x.shape, dtype=x.dtype) if draw.random() < 0.2 else torch.zeros_like(x)
        run.call(((zeros, *second[0][1:]), {}))


@step(1)
def same_memory(run: Run, draw: Random) -> None:
    """One buffer for the input of all calls, overwritten between them."""
    x, *rest = run.make(draw, Form(run.spec.rows))[0]
    with torch.no_grad():
        for _ in range(3):
            run.call(((x, *rest), {}))
            x.mul_(-0.5).add_(0.25)


@step(1)
def inference(run: Run, draw: Random) -> None:
    with torch.inference_mode():
        run.call(run.make(draw))
        run.call(run.make(draw))


@step(1)
def autocast(run: Run, draw: Random) -> None:
    """Under bfloat16 autocast, and outside it again."""
    with torch.no_grad():
        form = run.form(draw)
        if not run.spec.tagged("coarse", True):
            with torch.autocast("cpu", torch.bfloat16):
                run.call(run.make(draw, form))
                run.call(run.make(draw, form))
        run.call(run.make(draw, form))


@step(1)
def enabled(run: Run, draw: Random) -> None:
    """Gradients enabled and none asked for."""
    with torch.enable_grad():
        run.call(run.make(draw))


@step(2)
def gradients(run: Run, draw: Random) -> None:
    """Gradients with respect to the input and to the weights, each summed over members."""
    if run.rule not in ("mean", "sum", "median") or run.random or run.remembers_draws:
        return
    run.trained = True
    call = run.make(draw, replace(run.form(draw), layout="plain"))
    theirs = copied(call)
    x, mine = theirs[0][0].requires_grad_(), call[0][0].requires_grad_()
    direction = torch.Generator().manual_seed(draw.randrange(2**30))
    with torch.enable_grad():
        expected = run.loop(lambda member: member(*theirs[0], **theirs[1]))
        wanted = oracle.combined(expected, oracle.RULES[run.rule])
        loss, seed = _projected(wanted, direction)
        theirs_of = run.own(lambda: _gradients(loss, x, [p for m in run.members for p in m.parameters()]))
        run.outcome.calls += 1

        def evaluate() -> Any:
            answer = run.ensemble(*call[0], **call[1])
            run.compare(answer, expected)
            loss, _ = _projected(answer, torch.Generator().manual_seed(seed))
            return _gradients(loss, mine, list(run.ensemble.parameters()))

        # A rule that picks is not smooth, so rounding may pick another member for a gradient.
        smooth = run.rule != "median" or run.coarsest == torch.float64
        relative = (10 if smooth else 1e9) * oracle.tolerance(run.coarsest)
        run.attempt(evaluate, lambda found: oracle.check(found, theirs_of, relative))


def _projected(answer: Any, generator: torch.Generator) -> tuple[Tensor, int]:
    """A random linear function of an answer's scores."""
    total, seed = torch.zeros(()), generator.initial_seed()
    for leaf in pytree.tree_leaves(answer):
        if oracle.is_score(leaf):
            total = total + (leaf * torch.randn(leaf.shape, generator=generator, dtype=torch.float64)).sum()
    return total, seed


def _gradients(loss: Tensor, x: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    """The input's gradient, and two numbers that do not depend on how the members' weights are held."""
    trained = [p for p in parameters if p.requires_grad]
    for p in trained:
        p.grad = None
    if loss.requires_grad:
        loss.backward()
    pairs = [(p.detach().double(), p.grad.double()) for p in trained if p.grad is not None]
    for p in trained:
        p.grad = None
    along = sum(((g * p).sum() for p, g in pairs), torch.zeros((), dtype=torch.float64))
    size = sum((g.square().sum() for _, g in pairs), torch.zeros((), dtype=torch.float64)).sqrt()
    return [torch.zeros_like(x) if x.grad is None else x.grad, torch.stack([along, size])]


@step(0.5)
def degenerate(run: Run, draw: Random) -> None:
    """Zeros, and rows that are all the same, which show nothing of how rows and members meet."""
    spec, form = run.spec, Form(run.spec.rows)
    with torch.no_grad():
        call = run.make(draw, form)
        run.call(pytree.tree_map(torch.zeros_like, call))
        run.call(run.make(draw, replace(form, layout="expanded", time="common")))
        run.call(run.make(draw, form))
        if spec.context != "none":
            (x, t, *context), _ = run.make(draw, form)
            run.call(((x, t, *pytree.tree_map(torch.zeros_like, context)), {}))
            run.call(((x, t, *context), {}))


@step(0.3)
def not_a_number(run: Run, draw: Random) -> None:
    """A NaN among the inputs: where the loop answers NaN, so does the ensemble.

    The mean of attention's weights is a number that no row has a part in, and yet one row's NaN is in it: rows that are
    evaluated apart (max_fold) lose that.
    """
    apart = run.case.max_fold is not None and any(name == "MultiheadAttention" for name, _ in run.spec.blocks)
    if run.random or run.stateful or apart:
        return
    call = run.make(draw, Form(run.spec.rows))
    call[0][0].view(-1)[draw.randrange(call[0][0].numel())] = torch.nan
    theirs = copied(call)

    def check(answer: Any) -> None:
        wanted = oracle.combined(expected, oracle.RULES[run.rule])
        for a, e in zip(pytree.tree_leaves(answer), pytree.tree_leaves(wanted), strict=True):
            if oracle.is_score(e) and not bool((a.isnan() | ~e.isnan()).all()):
                raise oracle.Mismatch("a NaN was lost")

    with torch.no_grad():
        expected = run.loop(_answering(theirs))
        run.attempt(lambda: run.ensemble(*call[0], **call[1]), check)
        run.call(run.make(draw, Form(run.spec.rows)))


@step(1)
def threads(run: Run, draw: Random) -> None:
    """Two to eight threads that call at once, each on inputs of its own."""
    if run.random or run.stateful:
        return
    count, each = draw.choice([2, 4, 8]), 3
    grad = draw.random() < 0.3
    calls = [[run.make(draw) for _ in range(each)] for _ in range(count)]
    with torch.set_grad_enabled(grad):
        expected = [[run.loop(_answering(copied(call))) for call in some] for some in calls]
    errors: list[BaseException] = []
    start = threading.Barrier(count)

    def work(i: int) -> None:
        try:
            start.wait()
            with torch.set_grad_enabled(grad):
                for call, outputs in zip(calls[i], expected[i], strict=True):
                    answer = run.ensemble(*call[0], **call[1])
                    run.compare(answer, outputs)
                    if not grad:
                        spoil(answer)
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    run.outcome.calls += count * each

    def settle() -> None:
        if errors:
            raise errors[0]

    run.attempt(settle)


def _answering(call: Any) -> Callable[[Any], Any]:
    return lambda member: member(*call[0], **call[1])
