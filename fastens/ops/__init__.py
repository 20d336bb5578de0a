"""The ops: one module each, with the public function, schema, fake, autograd and dispatch side by side.

The registry names every op once its module is imported; :func:`all_ops` imports them all.
"""

from __future__ import annotations

import importlib
import pkgutil

from fastens.ops._dispatch import OPS, Op

__all__ = ["OPS", "Op", "all_ops"]


def all_ops() -> dict[str, Op]:
    """Import every op module of this folder and return the registry."""
    for module in pkgutil.iter_modules(__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"{__name__}.{module.name}")
    return OPS
