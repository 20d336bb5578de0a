"""What a sampler family demands of a model beyond calling it: one file per family."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastens.interop import diffusers, edm, guidance, k_diffusion

__all__ = ["diffusers", "edm", "guidance", "k_diffusion"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # each may import its family's library
        return importlib.import_module(f"fastens.interop.{name}")
    raise AttributeError(f"module 'fastens.interop' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
