"""State dicts of an ensemble, whatever its members shared when they were written and share now."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from fastens.network.tables import tables_of


def fit(network: nn.Module, state: dict[str, Any], prefix: str, unshare: Callable[[Iterable[str]], Any]) -> None:
    """Let a network and a state dict hold the same tensors once: members share some until something writes to them.

    Args:
        network: the folded network, which gives each member its own of what the state has for each.
        state: changed: what it has once, and each member of the network for itself, becomes a stack [K, ...].
        prefix: of the network's names in it.
        unshare: gives each member its own of what all share, by name.
    """
    apart: set[str] = set()
    for path, _, table in tables_of(network):
        for name, tensor in dict.items(table):
            full = f"{path}.{name}" if path else name
            given = state.get(prefix + full)
            if not isinstance(given, Tensor) or tensor is None:
                continue
            if name in table.common and given.shape == (table.num_members, *tensor.shape):
                apart.add(full)
            elif name not in table.common and given.shape == tensor.shape[1:]:
                state[prefix + full] = given.detach().expand(tensor.shape).clone()
    unshare(apart)
