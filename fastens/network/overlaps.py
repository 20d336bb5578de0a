"""Tensors that share memory in a member, which stacks hold apart: code may read them, and not write to them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastens.fold.tensor import MemberTensor, memory_of, modules_of, tensors_of
from fastens.network.snapshots import same_bits


def overlapping(members: Iterable[nn.Module]) -> frozenset[str]:
    """The names of parameters, buffers and attributes that have an element in common with another, in any member.

    What is computed of a parameter and kept in an attribute is none of them.
    """
    found: set[str] = set()
    for member in members:
        tensors, registered = _named(member), tensors_of(member)
        for a, b in _pairs(tensors):
            if not {a, b} <= registered.keys() and any(isinstance(tensors[n], nn.Parameter) for n in (a, b)):
                continue  # as hooks of torch keep what they compute of a parameter
            found |= {a, b}
    return frozenset(found)


def trained_together(member: nn.Module) -> tuple[str, str] | None:
    """The names of two parameters, or of one and a buffer, that have an element in common, where one is trained."""
    tensors = tensors_of(member)
    return next((pair for pair in _pairs(tensors) if any(tensors[name].requires_grad for name in pair)), None)


def _pairs(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """The names of tensors that have an element in common."""
    by_memory: dict[Any, list[str]] = {}
    for name, x in tensors.items():
        if x.layout is torch.strided and not is_lazy(x) and x.numel() and not x.is_meta:
            by_memory.setdefault(memory_of(x), []).append(name)
    for names in by_memory.values():
        for a, b in itertools.combinations(names, 2):
            if tensors[a] is not tensors[b] and _overlap(tensors[a], tensors[b]):
                yield a, b


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one memory have an element in common; those of two dtypes count as if they had."""
    if a.dtype is not b.dtype:
        return True
    taken = torch.zeros(a.untyped_storage().nbytes() // a.element_size(), dtype=torch.bool)
    taken.as_strided(a.shape, a.stride(), a.storage_offset()).fill_(True)
    return bool(taken.as_strided(b.shape, b.stride(), b.storage_offset()).any())


def _named(network: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a network, and the tensors that are attributes."""
    held = {
        f"{path}.{name}" if path else name: value.stack if isinstance(value, MemberTensor) else value
        for path, module in modules_of(network)
        for name, value in vars(module).items()
        if isinstance(value, Tensor)
    }
    return {**held, **tensors_of(network)}


def values_of(network: nn.Module, names: frozenset[str]) -> dict[str, Tensor]:
    """Copies of some tensors of a network, but for its parameters."""
    found = {name: x for name, x in _named(network).items() if name in names and not isinstance(x, nn.Parameter)}
    return {name: x.detach().clone() for name, x in found.items()}


def check_unwritten(names: Iterable[str]) -> None:
    """Raise where there are names of tensors, to which code of a member wrote.

    Raises:
        ValueError: names them, and the remedy.
    """
    if names := sorted(names):
        raise ValueError(
            f"{', '.join(names[:3])}: the members' code writes to a tensor that shares memory with another of its "
            "member, which stacks hold apart: register the whole alone, and take the part where it is used, as "
            "`self.whole[1:3]`; or give each a memory of its own by `clone()`"
        )


def written(network: nn.Module, before: Mapping[str, Tensor]) -> list[str]:
    """The names of those tensors of a network that hold other values than before."""
    now = _named(network) if before else {}
    return [name for name, x in before.items() if name in now and not same_bits(now[name].detach(), x)]
