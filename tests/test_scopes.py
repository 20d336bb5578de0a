"""Blocks of generators and tasks: what one said is gone once it is left, in whatever context that is."""

import asyncio
import contextvars

import pytest
import torch
from torch import nn

import fastens

MEMBERS = [nn.Linear(3, 3).requires_grad_(False) for _ in range(3)]
BLOCKS = {
    "assigned": lambda ens: ens.assigned([1, 1]),
    "unassigned": lambda ens: ens._draws.unassigned(),
    "trajectory": lambda ens: ens.trajectory(2, 0),
    "deterministic": lambda ens: fastens.deterministic(),
}


@pytest.fixture
def ens():
    return fastens.Ensemble(MEMBERS)


@pytest.fixture(params=BLOCKS)
def block(request, ens):
    return lambda: BLOCKS[request.param](ens)


def states(ens):
    return ens._draws.assignment(), ens._draws._trajectory(), fastens.reproducible.enabled(), ens._draws.any_assigned


def test_a_block_that_another_task_closes_holds_no_more(ens, block):
    before = states(ens)

    async def steps():
        with block():
            for _ in range(3):
                yield states(ens)

    async def read():
        failures = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
        async for inside in steps():
            assert inside != before
            break  # asyncio closes the generator in a task of its own
        for _ in range(3):
            await asyncio.sleep(0)
        assert states(ens) == before
        with block():  # and it can be entered again
            assert states(ens) != before
        assert states(ens) == before
        return failures

    assert asyncio.run(read()) == []
    assert states(ens) == before


def in_another_context(block):
    def steps():
        with block():
            yield

    generator = steps()
    contextvars.copy_context().run(next, generator)
    return generator


def test_a_block_that_another_context_closes_holds_no_more(ens, block):
    before = states(ens)
    in_another_context(block).close()
    assert states(ens) == before


def test_a_block_that_ends_where_it_did_not_hold_raises(ens, block):
    before = states(ens)
    generator = in_another_context(block)
    with pytest.raises(RuntimeError, match=r"the block of (ens|fastens)\.\w+ was entered in one thread or task"):
        next(generator)
    assert states(ens) == before


def test_blocks_inside_a_block_give_back_what_is_around_them(ens):
    x = torch.randn(2, 3)
    context = contextvars.copy_context()

    def steps():
        with ens.assigned([1, 1]):
            yield

    with ens.assigned([2, 2]):
        expected = ens(x)
        with ens._draws.unassigned():
            generator = steps()
            context.run(next, generator)
            assert not torch.equal(ens(x), expected)
        assert torch.equal(ens(x), expected)
        generator.close()
        assert torch.equal(ens(x), expected)
    assert not torch.equal(ens(x), expected)
    assert not torch.equal(context.run(ens, x), expected)
