"""Methods of members that need their forward alone, as for guidance: called on the ensemble, which evaluates it."""

from __future__ import annotations

import functools
import types
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from fastens.engine.leaves import VALUES, same
from fastens.internal import engine_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fastens.ensemble import Ensemble

# What is the ensemble's own among what such a method asks for; of the rest it finds what is the members'.
OWN = ("forward", "device", "dtype", "training", "train", "eval")
PLAIN = (types.FunctionType, *VALUES)


class ReadsParts(BaseException):
    """A method needs more of a member than its forward; of no class that code catches, which would hide it."""


class ThroughForward:
    """The ensemble as the ``self`` of a method of its members, which finds their forward and their plain values.

    Args:
        ensemble: whose forward it is.
        members: the modules that hold the members' Python state, of one class.
        call_method: what the ensemble hands out for a method of its members begins with it.
    """

    def __init__(self, ensemble: Ensemble, members: Sequence[nn.Module], call_method: Callable[..., Any]) -> None:
        self.__dict__.update(_ensemble=ensemble, _members=members, _call_method=call_method)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The ensemble's forward."""
        return self.__dict__["_ensemble"](*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """What the ensemble has of that name, where no part of a member is in it.

        Raises:
            ReadsParts: a module, a tensor, an object that may hold some, or what is another in other members.
        """
        ensemble, (member, *others) = self.__dict__["_ensemble"], self.__dict__["_members"]
        if name in OWN:
            return getattr(ensemble, name)
        tables = (ensemble._modules, member._modules, member._parameters, member._buffers)
        if hasattr(type(ensemble), name) or any(name in table for table in tables):
            raise ReadsParts(name)
        value = getattr(ensemble, name)
        if isinstance(value, functools.partial) and value.func is self.__dict__["_call_method"]:
            method = getattr(member, name)
            if method.__self__ is member and getattr(type(member), name, None) is method.__func__:
                return functools.partial(method.__func__, self)
        elif all(isinstance(x, PLAIN) for x in pytree.tree_leaves(value)) and all(
            same(getattr(other, name), value) for other in others
        ):
            return value
        raise ReadsParts(name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Refused: what a method writes is each member's.

        Raises:
            ReadsParts: always.
        """
        raise ReadsParts(name)


@functools.cache
def _of_class(member_class: type[nn.Module]) -> type[ThroughForward]:
    """One that says it is of the members' class, as ``super()`` and ``isinstance`` ask."""
    return type(ThroughForward.__name__, (ThroughForward,), {"__class__": member_class})


def through_forward(
    ensemble: Ensemble, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], call_method: Callable[..., Any]
) -> Any:
    """Call a method such as ``forward_with_cfg`` on the ensemble, whose forward it calls as it would call a member's.

    Raises:
        ReadsParts: it has another name than ``forward_...``, or needs more of a member than that.
    """
    network = ensemble.network
    members = list(network.children()) if engine_of(ensemble) is None else [network]
    of_class = getattr(type(members[0]), name, None)
    if not (name.startswith("forward_") and of_class is not None):
        raise ReadsParts(name)
    if any(type(member) is not type(members[0]) or name in vars(member) for member in members):
        raise ReadsParts(name)
    # which Dynamo cannot make
    made = ThroughForward if torch.compiler.is_compiling() else _of_class(type(members[0]))
    return of_class(made(ensemble, members, call_method), *args, **kwargs)
