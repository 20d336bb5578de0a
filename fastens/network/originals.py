"""The members that were handed in, as the oracle of a first call."""

from __future__ import annotations

import copy
from operator import is_
from typing import Any

from torch import nn

from fastens.fold.tensor import TABLES, modules_of, tensors_of
from fastens.network.alike import HOOK_TABLES
from fastens.network.contents import inside
from fastens.network.snapshots import held_tensors
from fastens.network.weights import as_it_is

_COUNTED = {*TABLES, "_barrier", "training", *HOOK_TABLES}  # looked at otherwise


class Originals:
    """The members that were handed in, kept until the first call was held against them.

    They are an oracle while neither they nor the stacks were changed since: same weights, same modes, same place.
    """

    def __init__(self, members: Any, network: nn.Module) -> None:
        self._members = members
        self._network = network
        self._counts = self._count()
        self._attributes = self._state()
        self._inside = [inside(each) for each in (network, *self.modules())]

    def modules(self) -> list[nn.Module]:
        """The members; none where they come from files."""
        listed = isinstance(self._members, list | tuple | nn.ModuleList)
        return [m for m in self._members if isinstance(m, nn.Module)] if listed else []

    def _parts(self) -> list[nn.Module]:
        """Every module of the network and of the members."""
        return [module for root in (self._network, *self.modules()) for _, module in modules_of(root)]

    def _count(self) -> list[list[Any]]:
        networks = (self._network, *self.modules())
        return [[as_it_is(t) for t in (*tensors_of(m).values(), *held_tensors(m))] for m in networks]

    def _state(self) -> list[tuple[nn.Module, dict[str, Any], dict[str, list[Any]]]]:
        """The attributes of every module, theirs and ours, which people set before a first call; its hooks."""
        return [(module, vars(module).copy(), _hooks(vars(module))) for module in self._parts()]

    def _as_they_were(self) -> bool:
        """Whether all modules are there, with the same attributes and hooks."""
        modules = self._parts()
        return len(modules) == len(self._attributes) and all(
            now is module and _same(attributes, vars(now)) and hooks == _hooks(vars(now))
            for now, (module, attributes, hooks) in zip(modules, self._attributes, strict=True)
        )

    def usable(self) -> bool:
        """Whether they still are what the stacks were made of, in the mode that the network is in."""
        if self._count() != self._counts or not (self._as_they_were() and all(each.same() for each in self._inside)):
            return False
        ours = _modes(self._network)
        device = next((t.device for t in tensors_of(self._network).values()), None)
        for member in self.modules():
            theirs = next((t.device for t in tensors_of(member).values()), None)
            if _modes(member) != ours or theirs != device:
                return False
        return True

    def of_one_object(self) -> frozenset[str]:
        """The names of tensors that are one object in the first two members, as what all of them share is."""
        members = self.modules()
        pairs = zip(modules_of(members[0]), modules_of(members[1]), strict=True) if len(members) > 1 else ()
        return frozenset(
            f"{path}.{name}" if path else name
            for (path, first), (_, other) in pairs
            for table in ("_parameters", "_buffers")
            for name, tensor in vars(first)[table].items()
            if tensor is not None and vars(other)[table].get(name) is tensor
        )

    def member(self, k: int) -> nn.Module:
        """Member k, read from its file where it came from one, in the mode that the network is in."""
        member, modes = self._members[k], _modes(self._network)
        if _modes(member) != modes:
            member = copy.deepcopy(member)
            for (_, module), mode in zip(modules_of(member), modes, strict=True):
                module.training = mode
        return member


def _modes(network: nn.Module) -> list[bool]:
    return [module.training for _, module in modules_of(network)]


def _hooks(attributes: dict[str, Any]) -> dict[str, list[Any]]:
    return {name: list(hooks.values()) for name in HOOK_TABLES if (hooks := attributes[name])}


def _same(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether a module has the attributes that it had, the same objects; those that are looked at otherwise apart."""
    if before.keys() == now.keys() and all(map(is_, before.values(), now.values())):
        return True
    mine, yours = ({name: x for name, x in each.items() if name not in _COUNTED} for each in (before, now))
    return mine.keys() == yours.keys() and all(x is yours[name] for name, x in mine.items())
