"""Tensors that torch cuts over a mesh, which stacks are not: their first dimension is the members'."""

from __future__ import annotations

import sys

from torch import Tensor


def check_whole(name: str, tensor: Tensor) -> None:
    """Raise where a tensor that takes the place of a stack is cut over a mesh, or replicated on one.

    Raises:
        ValueError: it is a ``DTensor``, as FSDP and tensor parallelism put them in.
    """
    meshes = sys.modules.get("torch.distributed.tensor")  # which nobody pays for who has none
    if meshes is not None and isinstance(tensor, meshes.DTensor):
        raise ValueError(
            f"{name} is a stack of an ensemble, which torch does not cut over a mesh, as fully_shard and "
            "parallelize_module do: DistributedDataParallel trains on several devices, and fastens.distribute spreads "
            "members over them to evaluate"
        )
