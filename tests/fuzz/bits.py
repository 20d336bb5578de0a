"""Random networks in deterministic mode: ``python -m tests.fuzz.bits 0 1000``.

Rows of one call are evaluated again in other batches, in another order, on one thread and two, planned and not, and by
another ensemble of the same members, and by some members apart, as the ranks of a mesh hold them. Each must have the
bits that it had, or the call must be refused.
"""

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from random import Random
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

import fastens
from fastens.distributed.shares import Share
from fastens.distributed.spreading import stacks_of
from fastens.engine.answers import answers_seen
from fastens.engine.arguments import Arguments
from fastens.engine.engine import Engine
from fastens.network.stacking import Stacked
from fastens.reproducible import NotReproducible
from tests.fuzz.inputs import draw_form, make_call
from tests.fuzz.networks import Network, draw_network, members_of
from tests.fuzz.tally import print_tally

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(x: Tensor) -> Tensor:
    """The bits of each element."""
    return x.contiguous().view(_INTEGERS[x.element_size()])


def draw(seed: int) -> tuple[Network, tuple[Any, Any], Random]:
    """A network whose batch is in front, a call of it, and what draws the batches."""
    chance = Random(f"bits {seed}")
    rows, dtype = chance.choice([5, 9, 17]), chance.choice(["float32", "float32", "bfloat16", "float64"])
    spec = dataclasses.replace(draw_network(seed), rows=rows, dtype=dtype, batch_second=False)
    if spec.context == "bank":  # whose size may be that of the batch by chance
        spec = dataclasses.replace(spec, context="none")
    form = dataclasses.replace(draw_form(spec, chance, rows), layout="plain")
    return spec, make_call(spec, form, seed, spec.torch_dtype), chance


def outcome(seed: int) -> str:
    """What became of a network: ``same``, why its calls were refused, or that members do not run.

    Raises:
        AssertionError: a row had other bits.
    """
    spec, call, chance = draw(seed)
    with torch.no_grad():
        try:
            members_of(spec)[0](*call[0], **call[1])
        except Exception as error:
            return f"no call of a member: {type(error).__name__}"
        known: dict[tuple[int, int], Tensor] = {}
        for threads in (1, 2):
            with _threads(threads):
                ensemble = fastens.Ensemble(members_of(spec))
                for size in (spec.rows, 1, 2, 1, spec.rows, 3):
                    order = chance.sample(range(spec.rows), size)
                    args, kwargs = _selected(call, order, spec)
                    try:
                        output = ensemble.member_outputs(*args, **kwargs)
                    except NotReproducible as error:
                        return f"refused: {str(error)[15:55]}"
                    _meet(known, order, output, f"seed {seed}, {size} rows, {threads} threads: {spec}")
                if threads == 2 and ensemble._engine is not None:
                    ranks, order = chance.choice([2, spec.members]), [0, spec.rows - 1]
                    output = _over_ranks(ensemble, ranks, *_selected(call, order, spec))
                    _meet(known, order, output, f"seed {seed}, {ranks} ranks: {spec}")
    return f"same, {'planned' if ensemble.report().plans else 'by torch'}"


def _over_ranks(ensemble: Any, ranks: int, args: Any, kwargs: Any) -> list[Tensor]:
    """Outputs [K, B, ...] of engines that hold some members each, and take plans where all of them have some."""
    engine, parts, agreed = ensemble._engine, [], False
    shares = [Share(ensemble.num_members, ranks, rank) for rank in range(ranks)]
    engines = [
        Engine(
            Stacked(engine.skeleton, stacks_of(engine, share), engine.shared, engine.overlapping),
            share.held,
            ensemble._settings,
        )
        for share in shares
    ]
    while not agreed:
        seen = []
        parts = []
        for each in engines:
            with answers_seen() as answers:
                parts.append(each.evaluate(Arguments(args, kwargs), ensemble.training))
            seen.append(answers)
        agreed = len({answers.planned for answers in seen}) == 1
        for answers in () if agreed else seen:
            answers.refuse()
    columns = zip(*(part[:-1] for part in parts), strict=True)
    return [
        torch.cat([torch.stack(list(x))[: share.count] for x, share in zip(column, shares, strict=True)])
        for column in columns
        if isinstance(column[0][0], Tensor)
    ]


def _selected(tree: Any, order: list[int], spec: Network) -> Any:
    def one(x: Any) -> Any:
        return x[order] if isinstance(x, Tensor) and x.ndim and x.shape[0] == spec.rows else x

    return pytree.tree_map(one, tree)


def _meet(known: dict[tuple[int, int], Tensor], order: list[int], output: Any, where: str) -> None:
    for leaf, x in enumerate(x for x in pytree.tree_leaves(output) if isinstance(x, Tensor)):
        for i, row in enumerate(order):
            found = bits(x[:, i])
            assert torch.equal(known.setdefault((leaf, row), found), found), f"row {row} has other bits in {where}"


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        with fastens.deterministic(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that members are looped
            yield
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    print_tally(outcome, "other bits")
