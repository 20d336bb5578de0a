"""The passes that a call takes: one of all members, or where memory asks for it some members or rows at a time."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from fastens.engine.arguments import Arguments
from fastens.engine.leaves import joined
from fastens.engine.memory_cap import is_out_of_memory
from fastens.fold.stand_ins import tracing
from fastens.fold.tensor import Hidden, NotFoldable, all_members, one_member

if TYPE_CHECKING:
    from fastens.engine.folding import FoldedMembers


class ReadsRows(NotFoldable):
    """Python reads a value of the input in a pass over some rows."""


def in_passes(engine: FoldedMembers, arguments: Arguments, key: Any, method: str) -> list[Any]:
    """The leaves of all members' outputs, [K, ...], and their structure last."""
    members, batch = engine.num_members, max(1, arguments.batch_size)
    given = arguments.copied() if engine.behaviour.writes_arguments else arguments

    def of_members(start: int, stop: int) -> list[Any]:
        first, last = start // batch, stop // batch
        some = all_members(members) if last - first == members else Hidden(last - first, members, first)
        return engine.one_pass(given, some, method)

    def by_rows() -> list[Any]:
        return joined([_by_rows(engine, given, key, k, method) for k in range(members)])

    if torch.compiler.is_compiling() or tracing():
        return engine.one_pass(given, all_members(members), method)
    if engine.cap.rows(key, members * batch) < batch and _may_part(engine, arguments, method):
        try:
            return engine.fold_apart(by_rows)
        except ReadsRows:  # what Python does may depend on all rows, as no call has shown yet
            engine.rows.mix(engine, arguments, method)
    several = engine.cap.rows(key, members * batch) < members * batch
    try:
        whole = functools.partial(engine.cap.run, key, members * batch, of_members, batch)
        return joined(engine.fold_apart(whole) if several else whole())
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or batch == 1 or not _may_part(engine, arguments, method):
            raise
    engine.cap.halve(key, batch)
    return engine.fold_apart(by_rows)


def _may_part(engine: FoldedMembers, arguments: Arguments, method: str) -> bool:
    """Whether a member's rows may go through several passes; derivatives may depend on all of them at once."""
    return not torch.is_grad_enabled() and engine.rows.independent(engine, arguments, method)


def _by_rows(engine: FoldedMembers, arguments: Arguments, key: Any, k: int, method: str) -> list[Any]:
    """One member, some of its rows at a time."""
    hidden = one_member(engine.num_members, k)

    def some(start: int, stop: int) -> list[Any]:
        return engine.one_pass(engine.rows.part(engine, arguments, start, stop), hidden, method, part=True)

    return joined(engine.cap.run(key, arguments.batch_size, some, 1), dim=1)
