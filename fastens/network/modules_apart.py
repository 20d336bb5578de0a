"""Members that differ in more than tensors: modules of their own, of which the first is looked at from outside."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from fastens.network.handed_out import HandOuts


class ModulesApart(nn.ModuleList):
    """The members, each a module of its own.

    Args:
        members: one module for each.
    """

    def __init__(self, members: Iterable[nn.Module]) -> None:
        super().__init__(members)
        self._handed_out = HandOuts("members differ, each with its own; change each of ens.network.children(), or")

    def get(self) -> list[nn.Module]:
        """The members, once what others changed in what was handed out of the first is done to all.

        Raises:
            ValueError: it cannot be done to all.
        """
        members = list(self.children())
        if self._handed_out:
            self._handed_out.follow(members)
        return members

    def running(self, members: Iterable[int]) -> AbstractContextManager[None]:
        """Scope of code of some members, which may change what was handed out of theirs."""
        return self._handed_out.running(members) if self._handed_out else nullcontext()

    def attribute(self, name: str) -> Any:
        """The first member's attribute, to be handed out."""
        members = list(self.children())
        value = getattr(members[0], name)
        self._handed_out.add(name, members)
        return value
