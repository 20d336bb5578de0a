"""Every member as a module of its own, for the loop: tensors in the stacks, Python state of its own."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from fastens.fold.guards import Barrier, unwatched
from fastens.fold.tables import view_of_member

_SKIPPED = {"_parameters", "_buffers", "_modules", "_barrier", "training"}
_HOOKS = tuple(name for name, value in vars(nn.Module()).items() if "_hooks" in name and isinstance(value, dict))
Made = TypeVar("Made")
_Attributes = list[tuple[nn.Module, dict[str, Any]]]


def undisturbed(make: Callable[[], Made]) -> Made:
    """What is made of state that calls of other threads write to, made again where they did meanwhile."""
    while True:
        try:
            return make()
        except RuntimeError as error:
            if "changed size during iteration" not in str(error):
                raise


class MemberViews:
    """The members of a folded network, made when they are asked for and again when its Python state was written to.

    What a member's own code wrote to itself is kept, unless the network was given another value since.

    Args:
        network: the folded network.
        num_members: K.
        barrier: counts writes to the network's Python state.
    """

    def __init__(self, network: nn.Module, num_members: int, barrier: Barrier) -> None:
        self._network = network
        self._num_members = num_members
        self._barrier = barrier
        self.forget()

    def forget(self) -> None:
        """Drop the members, and what they wrote to themselves."""
        self._views: list[nn.Module] = []
        self._writes = -1
        self._given: _Attributes = []  # the network's attributes when the views were made

    def get(self) -> list[nn.Module]:
        """The members, in the modes of the network's modules."""
        if self._writes != self._barrier.writes:
            self._make()
        for view in self._views:
            for module, original in zip(view.modules(), self._network.modules(), strict=True):
                if module.training is not original.training:
                    module.training = original.training
            self._hook(view)
        return self._views

    def _hook(self, view: nn.Module, anew: bool = False) -> None:
        """Give a member the hooks that the network has now, which run in fold and loop alike.

        Args:
            view: the member.
            anew: whether also those that it has already.
        """
        pairs = list(zip(view.modules(), self._network.modules(), strict=True))
        own: dict[int, nn.Module] = {}
        for module, original in pairs:
            for name in _HOOKS:
                hooks, found = getattr(original, name), getattr(module, name)
                if (hooks and anew) or hooks.keys() != found.keys():
                    own = own or {id(theirs): mine for mine, theirs in pairs}
                    module.__dict__[name] = type(hooks)((key, _rebound(hook, own)) for key, hook in hooks.items())

    def _make(self) -> None:
        writes = self._barrier.writes
        views = undisturbed(lambda: [unwatched(view_of_member(self._network, k)) for k in range(self._num_members)])
        for view in views:
            self._hook(view, anew=True)
        for view, before in zip(views, self._views, strict=False):
            self._carry_over(view, before)
        self._given = [(m, {n: v for n, v in vars(m).items() if n not in _SKIPPED}) for m in self._network.modules()]
        self._views, self._writes = views, writes

    def _carry_over(self, view: nn.Module, before: nn.Module) -> None:
        """Keep what a member wrote to itself where the network has the value that it had."""
        given = {id(module): attributes for module, attributes in self._given}
        olds = {id(original): old for (original, _), old in zip(self._given, before.modules(), strict=False)}
        for module, original in zip(view.modules(), self._network.modules(), strict=True):
            old, known = olds.get(id(original)), given.get(id(original))
            if old is None or known is None:
                continue
            now = vars(original)
            for name, value in vars(old).items():
                unchanged = (name in now) is (name in known) and now.get(name) is known.get(name)
                if name not in _SKIPPED and "_hooks" not in name and unchanged:
                    module.__dict__[name] = value


def _rebound(hook: Any, own: dict[int, nn.Module]) -> Any:
    """A hook for one member: a method of a module of the network is that of the member's own module."""
    if isinstance(hook, types.MethodType) and id(hook.__self__) in own:
        return types.MethodType(hook.__func__, own[id(hook.__self__)])
    if isinstance(hook, functools.partial):
        args = [own.get(id(x), x) for x in hook.args]
        keywords = {name: own.get(id(x), x) for name, x in hook.keywords.items()}
        return functools.partial(_rebound(hook.func, own), *args, **keywords)
    return hook
