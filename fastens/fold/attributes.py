"""What code sets on parameters and buffers beside their values: attributes of Python, such as tags for an optimizer.

They are a part of what members have in common. A stack has them, and so has whatever stands for a member's part of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

# Of torch, and of the library that read a checkpoint: they say nothing of what a network computes.
_OF_OTHERS = {"_is_param", "_is_hf_initialized"}
_GIVEN = "_fastens_given"  # what a tensor was given that keeps among its attributes what it is made of


class SetWhenCalled(ValueError):
    """Members set attributes of their weights when they are called.

    Args:
        names: paths of the weights with their attributes.
    """

    def __init__(self, names: Iterable[str]) -> None:
        shown = ", ".join(sorted(names)[:3])
        super().__init__(
            f"members set attributes of their parameters or buffers when they are called ({shown}), which an ensemble "
            "does not keep for each: set them on the module, or on every member beforehand"
        )


def _made_of_attributes(tensor: Tensor) -> bool:
    kind = type(tensor)
    ordinary = kind in (Tensor, nn.Parameter) or nn.Parameter in kind.__mro__
    return not ordinary or (kind is not nn.Parameter and is_traceable_wrapper_subclass(tensor))


def attributes_of(tensor: Tensor) -> dict[str, Any]:
    """The attributes that code set on a parameter or buffer."""
    held = vars(tensor)
    if not held:
        return {}
    if _made_of_attributes(tensor):
        return held.get(_GIVEN, {})
    return {name: x for name, x in held.items() if name not in _OF_OTHERS and not name.startswith("_dynamo")}


def give(tensor: Tensor, attributes: dict[str, Any]) -> None:
    """Let a tensor have these attributes."""
    if attributes:
        vars(tensor).update(attributes)
        if _made_of_attributes(tensor):
            vars(tensor)[_GIVEN] = attributes


def standing_for(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that is read in the place of another, with the attributes of that one as they are now."""
    if tensor is not like and (vars(like) or vars(tensor)):
        wanted = attributes_of(like)
        for name in attributes_of(tensor).keys() - wanted.keys():
            del vars(tensor)[name]
        give(tensor, wanted)
    return tensor


def set_since(tensor: Tensor, before: dict[str, Any]) -> list[str]:
    """The attributes that were set on a tensor, or taken from it, since it had others."""
    now = attributes_of(tensor)
    return [name for name in {**now, **before} if now.get(name, now) is not before.get(name, before)]
