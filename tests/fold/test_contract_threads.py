"""Threads and asyncio tasks that call one ensemble at once, first calls included."""

import asyncio
import threading

import pytest
import torch
from torch import nn

import fastens
from tests.fold.contract import RELATIVE, K, made

THREADS = 8


def network(k):
    class Mixing(nn.Module):
        def forward(self, x):
            return x * 0.5 + x.mean(0)

    return nn.Sequential(nn.Linear(4, 8), nn.SiLU(), Mixing() if k is None else nn.Identity(), nn.Linear(8, 4))


def together(work, count=THREADS):
    """Run ``work(i)`` in threads that begin at once; raise what the first of them raised."""
    errors, start = [], threading.Barrier(count)

    def one(i):
        try:
            start.wait()
            work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def near(found, expected):
    assert float((found - expected).abs().max()) <= RELATIVE * float(expected.abs().max())


def inputs(thread, calls, rows=(5,)):
    generator = torch.Generator().manual_seed(thread)
    return [torch.randn(rows[(i + thread) % len(rows)], 4, generator=generator) for i in range(calls)]


def averaged(members, x):
    return torch.stack([m(x) for m in members]).mean(0)


@pytest.mark.parametrize("rows", [(5,), (1, 2, 3, 5, 7)], ids=["one shape", "several shapes"])
@pytest.mark.parametrize("engine", ["auto", "fold", "loop", "apart", "reads"])
def test_first_calls_raced(engine, rows):
    """Also where members are looped since they differ or read their values."""
    members = [apart(k, engine) for k in range(K)]
    with torch.no_grad():
        wanted = [[(x, averaged(members, x)) for x in inputs(i, 10, rows)] for i in range(THREADS)]
    for _ in range(2):
        ensemble = fastens.Ensemble(
            [apart(k, engine) for k in range(K)], engine=engine if engine in ("fold", "loop") else "auto"
        )

        def work(i, ensemble=ensemble):
            with torch.no_grad():
                for x, expected in wanted[i]:
                    near(ensemble(x), expected)

        together(work)
        together(work)  # warm
        assert ensemble.engine == ("fold" if engine in ("auto", "fold") else "loop")


class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(x) * float(self.inner.bias.detach()[0])


def apart(k, engine):
    if engine == "reads":
        return made(lambda j: Reads(), k)
    member = made(lambda j: network(0), k)
    if engine == "apart":
        member.number = k
    return member


@pytest.mark.parametrize("engine", ["fold", "loop"])
def test_gradients_of_threads(engine):
    members = [apart(k, engine) for k in range(K)]
    ensemble = fastens.Ensemble(members, engine=engine)
    direction = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    wanted = []
    for i in range(THREADS):
        given = [x.requires_grad_() for x in inputs(i, 5)]
        wanted.append(
            [(x.detach(), torch.autograd.grad((averaged(members, x) * direction).sum(), x)[0]) for x in given]
        )

    def work(i):
        for x, expected in wanted[i]:
            x = x.clone().requires_grad_()
            near(torch.autograd.grad((ensemble(x) * direction).sum(), x)[0], expected)

    together(work)
    together(work)


def followed(ensemble, xs, seed, rows):
    with torch.no_grad(), ensemble.trajectory(rows, seed):
        return [ensemble(x) for x in xs]


@pytest.mark.parametrize("engine", ["fold", "loop"])
@pytest.mark.parametrize("rule", ["alternating", "mixture"])
def test_drawn_rules_over_new_shapes(rule, engine):
    """Each thread's trajectory is that of its seed alone, though all share one ensemble."""
    alone = fastens.Ensemble([apart(k, engine) for k in range(K)], rule, engine=engine)
    given = [inputs(i, 4, (1 + i % 4,)) for i in range(THREADS)]
    wanted = [followed(alone, xs, i, len(xs[0])) for i, xs in enumerate(given)]
    ensemble = fastens.Ensemble([apart(k, engine) for k in range(K)], rule, engine=engine)

    def work(i):
        for _ in range(3):
            for found, expected in zip(followed(ensemble, given[i], i, len(given[i][0])), wanted[i], strict=True):
                near(found, expected)

    together(work)
    assert ensemble.engine == engine


def test_modes_and_arguments_of_threads():
    """Some threads with gradients or in inference mode, all with arguments of each member's own now and then."""
    members = [apart(k, "auto") for k in range(K)]
    ensemble = fastens.Ensemble(members)
    with torch.no_grad():
        wanted = [[(x, torch.stack([m(x) for m in members])) for x in inputs(i, 8)] for i in range(THREADS)]

    def work(i):
        with torch.inference_mode(i % 2 == 0), torch.set_grad_enabled(i % 3 == 0):
            for x, stack in wanted[i]:
                near(ensemble(x).detach(), stack.mean(0))
                near(ensemble.member_outputs(x).detach(), stack)
                near(ensemble(fastens.PerMember(list(stack))).detach(),
                     torch.stack([m(s) for m, s in zip(members, stack, strict=True)]).detach().mean(0))  # fmt: skip

    together(work)


def test_a_thread_has_no_trajectory_of_another():
    ensemble = fastens.Ensemble([apart(k, "auto") for k in range(K)], "mixture")
    with torch.no_grad(), ensemble.trajectory(5, 0):
        ensemble(torch.randn(5, 4))

        def work(i):
            with pytest.raises(RuntimeError, match="inside"), torch.no_grad():
                ensemble(torch.randn(5, 4))

        together(work, 2)


@pytest.mark.parametrize("engine", ["fold", "loop"])
def test_tasks_have_trajectories_of_their_own(engine):
    ensemble = fastens.Ensemble([apart(k, engine) for k in range(K)], "mixture", engine=engine)
    given = [inputs(i, 5, (1 + i,)) for i in range(4)]
    wanted = [followed(ensemble, xs, i, len(xs[0])) for i, xs in enumerate(given)]

    async def sampler(i):
        found = []
        with ensemble.trajectory(len(given[i][0]), i):
            for x in given[i]:
                await asyncio.sleep(0)
                found.append(ensemble(x))
                with pytest.raises(RuntimeError, match="already in progress"), ensemble.trajectory(2):
                    pass
        return found

    async def of_all():
        return await asyncio.gather(*map(sampler, range(4)))

    with torch.no_grad():  # which is a thread's, not a task's
        outputs = asyncio.run(of_all())
    for found, expected in zip(outputs, wanted, strict=True):
        for a, b in zip(found, expected, strict=True):
            near(a, b)


def test_tasks_in_threads_of_an_executor():
    """A task's trajectory goes with the work that it hands to a thread, and with nobody else's."""
    ensemble = fastens.Ensemble([apart(k, "auto") for k in range(K)], "mixture")
    given = [inputs(i, 4, (2,)) for i in range(4)]
    wanted = [followed(ensemble, xs, i, 2) for i, xs in enumerate(given)]

    def step(x):
        with torch.no_grad():
            return ensemble(x)

    async def sampler(i):
        with ensemble.trajectory(2, i):
            return [await asyncio.to_thread(step, x) for x in given[i]]

    async def of_all():
        return await asyncio.gather(*map(sampler, range(4)))

    for found, expected in zip(asyncio.run(of_all()), wanted, strict=True):
        for a, b in zip(found, expected, strict=True):
            near(a, b)
