"""Stacks of an ensemble over a mesh, as a state dict of one ensemble: torch's DTensors, cut by members."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from fastens.distributed.shares import Share

_NETWORK = "network."


def _is_stack(name: str, stacked: frozenset[str]) -> bool:
    return name.rpartition(_NETWORK)[2] in stacked


def as_whole(state: Any, stacked: frozenset[str], mesh: DeviceMesh, share: Share, num_members: int) -> Any:
    """A state dict of stacks of one rank's members as one of stacks [K, ...], in the same memory."""
    for name, own in state.items():
        if not isinstance(own, Tensor) or not _is_stack(name, stacked):
            continue
        local = own.detach()[: share.count]
        shape = torch.Size((num_members, *own.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        # Each rank says only where its part is: nothing is sent.
        state[name] = DTensor.from_local(
            local, mesh, (Shard(0), Replicate()), run_check=False, shape=shape, stride=stride
        )
    return state


def of_rank(state: Mapping[str, Any], stacked: frozenset[str], share: Share, own: Mapping[str, Any]) -> dict[str, Any]:
    """Return this rank's part of a state dict of stacks [K, ...]; padding members keep what they hold."""
    found: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, DTensor):
            value = value.to_local() if share.count else own[name]
        elif isinstance(value, Tensor) and _is_stack(name, stacked):
            value = value[share.slice]
        found[name] = value
    return found
