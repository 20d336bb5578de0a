"""State dicts of an ensemble, whatever its members shared when they were written and share now."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastens.fold.tensor import TABLES, modules_of
from fastens.network.member_tables import MemberTable
from fastens.network.tables import tables_of, unsaved_in


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


def _own_tensors(views: Sequence[nn.Module]) -> Iterator[tuple[str, list[tuple[MemberTable, str]]]]:
    """The tensors that looped members registered themselves and save, by path, each with its table in every member."""
    together = zip(*(modules_of(view) for view in views), strict=False)
    for (path, module), *others in together:
        modules = [module, *(other for _, other in others)]
        for kind in TABLES[:2]:
            tables = [vars(each)[kind] for each in modules]
            if not all(isinstance(table, MemberTable) for table in tables):
                continue
            unsaved = unsaved_in(module, kind)
            for name in sorted(set.intersection(*(table.own for table in tables)) - unsaved):
                if all(isinstance(dict.get(table, name), Tensor) for table in tables):
                    yield f"{path}.{name}" if path else name, [(table, name) for table in tables]


def save_own(views: Sequence[nn.Module], state: dict[str, Any], prefix: str) -> None:
    """Add to a state dict what looped members registered themselves, [K, ...]: their own state dicts have it."""
    for full, places in _own_tensors(views):
        values = [dict.__getitem__(table, name).detach() for table, name in places]
        if any(x.shape != values[0].shape or x.dtype != values[0].dtype for x in values):
            warnings.warn(
                f"fastens: {full} is of another shape or dtype in other members, and the ensemble's state dict is "
                "without it: those of `ens.members[k]` have it",
                stacklevel=2,
            )
            continue
        state.setdefault(prefix + full, torch.stack(values))


def load_own(views: Sequence[nn.Module], state: dict[str, Any], prefix: str, missing: list[str]) -> None:
    """Take from a state dict what :func:`save_own` added to it; what is of another shape is left, for torch's error."""
    for full, places in _own_tensors(views):
        values = [dict.__getitem__(table, name) for table, name in places]
        given = state.get(prefix + full)
        if given is None:
            missing.append(prefix + full)
        elif given.shape == (len(values), *values[0].shape):
            del state[prefix + full]
            for value, own in zip(values, given, strict=True):
                with torch.inference_mode() if value.is_inference() else torch.no_grad():
                    value.copy_(own)
