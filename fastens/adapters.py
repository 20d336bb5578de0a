"""How an ensemble becomes like its members from outside: the class of their family, and their signature."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

from torch import nn

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


@functools.cache
def with_signature(base: type[Ensemble], member_class: type[nn.Module]) -> type[Ensemble]:
    """A subclass of ``base`` whose forward has the signature of the member's, for callers that inspect it."""

    def forward(self: Ensemble, *args: Any, **kwargs: Any) -> Any:
        return base.forward(self, *args, **kwargs)

    forward.__doc__ = base.forward.__doc__
    forward.__signature__ = inspect.signature(member_class.forward)  # pyright: ignore[reportFunctionMemberAccess]
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (base,), {**names, "forward": forward})
