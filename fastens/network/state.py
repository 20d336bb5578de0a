"""The state of a network: its attributes, what they hold, and its buffers; saved, and put back after a pass."""

from __future__ import annotations

import pickle
import random
import types
from collections.abc import Iterator
from contextlib import contextmanager
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastens.device import random_forked, random_states
from fastens.fold.attributes import attributes_of, give, set_since
from fastens.fold.tensor import TABLES, modules_of
from fastens.network.alike import HOOK_TABLES
from fastens.network.barrier import class_of
from fastens.network.global_state import GlobalState
from fastens.network.made import has_tensors
from fastens.network.member_tables import MemberTable
from fastens.network.reaching_back import Back, reaches_back
from fastens.network.snapshots import TENSOR, Snapshot, is_atom, snapshots_of
from fastens.network.tables import Stacks

DRAWS_ELSEWHERE = "their code draws from Python's or NumPy's random generators, each a number of its own"
REREAD = ("_flat_weights", "_flat_weight_refs")  # which recurrent layers make anew in their forward
_LOOKED_AT_ELSEWHERE = frozenset((*TABLES, *HOOK_TABLES, "_barrier", "_non_persistent_buffers_set"))


class Changed(set[str]):
    """The names of what a pass changed of a network.

    Attributes:
        outside: whether some of it is shared by all members: attributes of classes, globals, defaults of functions.
        attributes: those of parameters and buffers that it set.
        modules: the paths of modules with tensors that it made, replaced or removed.
        back: what it left behind that reaches the network and that a copy keeps, none where there is none.
    """

    outside = False
    back: Back | None = None
    attributes: frozenset[str] = frozenset()
    modules: frozenset[str] = frozenset()


class NetworkState:
    """A network's Python state and buffers, and what its code can change outside of it; to be put back."""

    def __init__(self, network: nn.Module) -> None:
        self._network, modules = network, modules_of(network)
        self._tables = [t for _, m in modules for t in (m._parameters, m._buffers) if isinstance(t, MemberTable)]
        seen = {id(module) for _, module in modules}
        seen.update(id(x) for _, m in modules for table in (m._parameters, m._buffers) for x in dict.values(table))
        self._saved = [_OfModule(f"{path}." if path else "", module, seen) for path, module in modules]
        code: set[type | types.FunctionType] = {class_of(module) for _, module in modules}
        code.update(x for _, m in modules for x in vars(m).values() if type(x) is types.FunctionType)
        self._outside = GlobalState(code, seen)
        self._draws = GlobalDraws() if self._outside.draws else None

    def shared(self) -> str:
        """Undo what was changed outside of the network, which members share; say what it was, empty where nothing."""
        changed = sorted(self._outside.put_back())
        if self._draws is not None and self._draws.put_back():
            return DRAWS_ELSEWHERE
        return f"their code changes what they share ({', '.join(changed[:3])})" if changed else ""

    def put_back(self) -> Changed:
        """Undo what happened to it; return the names of what had been changed."""
        attributes = {name for table in self._tables for name in table.attributes_set()}
        attributes.update(name for saved in self._saved for name in saved.attributes_put_back())
        changed = Changed(name for table in self._tables for name in table.settle(keeps=False))
        changed.attributes = frozenset(attributes)
        changed |= attributes
        if any(saved.has_other_attributes() for saved in self._saved):
            changed.back = reaches_back(self._network, HOOK_TABLES)
        for saved in self._saved:
            saved.put_back(changed)
        others = {path: x for saved in self._saved for path, x in saved.modules_put_back().items()}
        changed.update(others)
        changed.modules = frozenset(path for path, modules in others.items() if any(map(has_tensors, modules)))
        outside = self._outside.put_back()
        changed |= outside
        changed.outside = bool(outside)
        return changed


class _OfModule:
    """One module's attributes, what they hold, its parameters and its buffers."""

    def __init__(self, prefix: str, module: nn.Module, seen: set[int]) -> None:
        self._prefix, self._attributes = prefix, vars(module)
        self._before = self._attributes.copy()
        tables = [table for name in TABLES[:2] if type(table := self._before[name]) in (dict, Stacks, MemberTable)]
        self._hooks = [(name, table, dict(table)) for name in HOOK_TABLES if (table := self._before.get(name))]
        self._children = self._before["_modules"], dict(self._before["_modules"])
        self._tensors = [_Kept(table, name, x) for table in tables for name, x in _own(table) if x is not None]
        # of a member's stacks, the network's tables tell
        self._names = [
            (table, {n: x is None for n, x in dict.items(table)}) for table in tables if type(table) is not MemberTable
        ]
        self._held = [
            (name, held)
            for name, value in self._before.items()
            if name not in _LOOKED_AT_ELSEWHERE and not is_atom(value)
            for held in snapshots_of(value, seen)
        ]

    def has_other_attributes(self) -> bool:
        """Whether attributes were set, or taken away."""
        now, before = self._attributes, self._before
        return len(now) != len(before) or not all(map(is_, now.values(), before.values()))

    def put_back(self, changed: set[str]) -> None:
        """Undo what happened to it, and add the names of what had been changed."""
        now, before, prefix = self._attributes, self._before, self._prefix
        if self.has_other_attributes():
            for name in [n for n in now if n not in before and n not in REREAD]:
                changed.add(f"{prefix}{name}")
                del now[name]
            for name, value in before.items():
                if now.get(name, changed) is not value and name not in REREAD:
                    changed.add(f"{prefix}{name}")
                    now[name] = value
        changed.update(f"{prefix}{name}" for name, held in self._held if held.restored() and name not in REREAD)
        changed.update(f"{prefix}{tensor.name}" for tensor in self._tensors if tensor.restored())
        for name, table, before in self._hooks:
            if list(table) != list(before):  # such as one that removes itself when it is called
                changed.add(f"{prefix}{name}")
                table.clear()
                table.update(before)
        for table, names in self._names:
            for name in [n for n, x in dict.items(table) if names.get(n, True) and (x is not None or n not in names)]:
                changed.add(f"{prefix}{name}")  # registered meanwhile, or set where there was none
                if isinstance(table, Stacks):
                    table.withdraw(name, empty=name in names)
                elif name in names:
                    table[name] = None
                else:
                    table.pop(name)

    def attributes_put_back(self) -> list[str]:
        """Undo what was set on its parameters and buffers; return what it was."""
        return [f"{self._prefix}{x.name}.{name}" for x in self._tensors for name in x.attributes_put_back()]

    def modules_put_back(self) -> dict[str, tuple[Any, Any]]:
        """Undo what happened to its modules; return those that were there and those that were put in, by path."""
        table, before = self._children
        now = dict(table)
        if now == before and list(now) == list(before):
            return {}
        dict.clear(table)
        dict.update(table, before)
        pairs = {name: (before.get(name), now.get(name)) for name in {**before, **now}}
        return {f"{self._prefix}{name}": (x, y) for name, (x, y) in pairs.items() if x is not y}


def _own(table: dict[str, Any]) -> list[tuple[str, Any]]:
    """The tensors of a table, of a member's those that have no place in the stacks."""
    own = [(name, table[name]) for name in table.own] if isinstance(table, MemberTable) else dict.items(table)
    return list(own)


class GlobalDraws:
    """Where the global generators of Python and NumPy are; to go back there."""

    def __init__(self) -> None:
        self._python, self._array = random.getstate(), np.random.get_state()

    def drawn(self) -> bool:
        """Whether numbers were drawn since."""
        return random.getstate() != self._python or pickle.dumps(np.random.get_state()) != pickle.dumps(self._array)

    def put_back(self) -> bool:
        """Go back; return whether numbers had been drawn."""
        drawn = self.drawn()
        if drawn:
            random.setstate(self._python)
            np.random.set_state(self._array)
        return drawn


class TorchDraws:
    """Where torch's global generators are, the CPU's and those of GPUs that are used."""

    def __init__(self) -> None:
        self._before = self._now()

    @staticmethod
    def _now() -> list[Tensor]:
        return [torch.random.get_rng_state(), *random_states()]

    def drawn(self) -> bool:
        """Whether numbers were drawn since."""
        now = self._now()
        return len(now) != len(self._before) or not all(map(torch.equal, now, self._before))


@contextmanager
def random_kept() -> Iterator[None]:
    """Undo what is drawn from the global generators of torch, Python and NumPy."""
    elsewhere = GlobalDraws()
    try:
        with random_forked():
            yield
    finally:
        elsewhere.put_back()


@contextmanager
def state_kept(network: nn.Module) -> Iterator[Changed]:
    """Undo what a pass does to a network's Python state and to its buffers; yields the names of what it changed."""
    changed = Changed()
    state = NetworkState(network)
    try:
        yield changed
    finally:
        found = state.put_back()
        changed |= found
        changed.outside, changed.modules, changed.back = found.outside, found.modules, found.back
        changed.attributes = found.attributes


class _Kept:
    """One parameter or buffer as it was: in its table, in memory and, for a buffer, in value."""

    def __init__(self, table: dict[str, Any], name: str, tensor: Tensor) -> None:
        self.name = name
        self._table = table
        self._common = isinstance(table, Stacks) and name in table.common
        self._tensor = Snapshot(tensor, TENSOR.save(tensor), TENSOR)
        self._attributes = attributes_of(tensor)

    def attributes_put_back(self) -> list[str]:
        """Give the tensor the attributes that it had; return those that were changed."""
        changed = set_since(self._tensor.value, self._attributes)
        for name in changed:
            vars(self._tensor.value).pop(name, None)
        give(self._tensor.value, self._attributes)
        return changed

    def restored(self) -> bool:
        """Put the tensor back in its table and its values in place; return whether anything had been changed."""
        replaced = dict.get(self._table, self.name) is not self._tensor.value
        if replaced:
            dict.__setitem__(self._table, self.name, self._tensor.value)
        if isinstance(self._table, Stacks) and (self.name in self._table.common) is not self._common:
            (self._table.common.add if self._common else self._table.common.discard)(self.name)
        return self._tensor.restored() or replaced
