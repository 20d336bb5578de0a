"""How an ensemble becomes like its members from outside: the class of their family, and their signature."""

from __future__ import annotations

import functools
import inspect
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from torch import nn

from fastens.fold.tensor import MemberTensor
from fastens.methods import call_method
from fastens.network.in_place import own_copy

if TYPE_CHECKING:
    from fastens.ensemble import Ensemble

# Families that demand more than a call: a module with ``ensemble_class(member, kind)``, by the top-level package of a
# member's class or a parent's, and by attributes of members whose classes may come from anywhere.
ADAPTERS = {"diffusers": "fastens.interop.diffusers"}
ATTRIBUTES = {
    ("sigma_min", "sigma_max", "round_sigma"): "fastens.interop.edm",
    ("apply_model", "alphas_cumprod"): "fastens.interop.k_diffusion",
}


def adapter_of(member: nn.Module) -> str | None:
    """The module that knows the family of a member, none where no family demands more than a call."""
    for parent in type(member).__mro__:
        adapter = ADAPTERS.get(parent.__module__.partition(".")[0])
        if adapter is not None:
            return adapter
    return next((module for names, module in ATTRIBUTES.items() if all(hasattr(member, n) for n in names)), None)


class MemberLike(nn.Module):
    """What an ensemble has of its members: attributes that it has not itself, to read and to set."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute of all members where it is theirs and not the ensemble's."""
        network = self.__dict__.get("_modules", {}).get("network")
        own = network is None or name in self.__dict__ or name in self._modules or hasattr(type(self), name)
        looped = not own and self.__dict__["_engine"] is None
        members = [] if own or network is None else list(network.children()) if looped else [network]
        if members and all(hasattr(member, name) for member in members):
            for k, member in enumerate(members):
                setattr(member, name, own_copy(value) if k else value)
        else:
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        """Look like a member: attributes that the ensemble has not are the members'."""
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            network = self.__dict__.get("_modules", {}).get("network")
            if network is None or name.startswith("__"):
                raise
        engine = self.__dict__["_engine"]
        member = next(network.children()) if engine is None else network
        try:
            value = network.attribute(name) if engine is None else engine.attribute(name)
        except AttributeError:
            error = AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)
            error.add_note(f"its members, of class {type(member).__name__}, have none either")
            raise error from None
        if isinstance(value, MemberTensor):
            return value.stack
        if inspect.ismethod(value) and _is_part(value.__self__, member):
            ensemble: Any = self
            return functools.partial(call_method, ensemble, name)
        return value


def _is_part(owner: Any, member: nn.Module) -> bool:
    """Whether the owner of a method is a member, or the module inside it that it leaves the attribute to."""
    return owner is member or (isinstance(owner, nn.Module) and any(owner is each for each in member.modules()))


@functools.cache
def with_signature(base: type[Ensemble], member_class: type[nn.Module]) -> type[Ensemble]:
    """A subclass of ``base`` that says of itself what the member's class says: to those who inspect or ask it.

    Its forward has the signature of the member's, and what a framework's base class says of any model (whether it
    checkpoints gradients, which blocks repeat, ...) is what the member's class says there.
    """

    def forward(self: Ensemble, *args: Any, **kwargs: Any) -> Any:
        return base.forward(self, *args, **kwargs)

    forward.__doc__ = base.forward.__doc__
    with suppress(AttributeError, TypeError, ValueError):  # a TorchScript class has none
        forward.__signature__ = inspect.signature(member_class.forward)
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (base,), {**_said_of_models(base, member_class), **names, "forward": forward})


def _said_of_models(base: type[Ensemble], member_class: type[nn.Module]) -> dict[str, Any]:
    """The class attributes, no code among them, of the classes that both descend from, as the member's class has them.

    An ensemble inherits them, so that they are never asked of its members as other attributes are.
    """
    common = {*member_class.__mro__} & {*base.__mro__} - {*nn.Module.__mro__}
    values = {name: inspect.getattr_static(member_class, name) for parent in common for name in vars(parent)}
    code = (property, classmethod, staticmethod)
    return {n: v for n, v in values.items() if not (n.startswith("__") or callable(v) or isinstance(v, code))}
