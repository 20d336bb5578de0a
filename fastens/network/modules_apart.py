"""Members that differ in more than tensors: modules of their own, of which the first is looked at from outside."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from fastens.network.handed_out import BY_NUMBER, HandOuts

_NUMBERS = itertools.count()


class ModulesApart(nn.ModuleList):
    """The members, each a module of its own.

    Args:
        members: one module for each.
    """

    def __init__(self, members: Iterable[nn.Module]) -> None:
        super().__init__(members)
        self._handed_out = HandOuts("members differ, each with its own; change each of ens.network.children(), or")
        self._number = str(next(_NUMBERS))
        BY_NUMBER[self._number] = self

    def get(self) -> list[nn.Module]:
        """The members, once what others changed in what was handed out of the first is done to all.

        Raises:
            ValueError: it cannot be done to all.
        """
        if torch.compiler.is_dynamo_compiling():
            from fastens.network.followed import followed  # as dynamo traces this line, which has been imported then

            followed(self._number)
        elif self._handed_out:
            self._handed_out.follow(list(self.children()))
        return list(self.children())

    def running(self, members: Iterable[int]) -> AbstractContextManager[None]:
        """Scope of code of some members, which may change what was handed out of theirs."""
        if torch.compiler.is_dynamo_compiling() or not self._handed_out:
            return nullcontext()
        return self._handed_out.running(members)

    def attribute(self, name: str) -> Any:
        """The first member's attribute, to be handed out."""
        members = list(self.children())
        value = getattr(members[0], name)
        self._handed_out.add(name, members)
        return value
