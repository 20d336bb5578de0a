"""What a lowering has to know of the back end that it lowers for."""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class Target:
    """What the nodes of a back end can do; all else of the lowering is the same for all.

    Attributes:
        floats: dtypes that nodes compute in.
        copied: dtypes that elementwise nodes read and write.
        read_in_buffers: dtypes of what nodes read in buffers, and
        read_in_arguments: in arguments as they are.
        widens: whether half precision is held in float32 in buffers.
        tables: whether elementwise nodes can read a norm's scale and shift, which otherwise only convolutions apply.
        mask_lanes: channels of a word of a dropout mask.
        divides: whether convolutions divide by a number behind.
        fills: whether a number everywhere is an elementwise node.
        copies_all: whether elementwise nodes copy every dtype to its own bits.
        exact_log: whether the logarithm of an elementwise node is torch's to the last bit.
        shared_heads: whether several heads of queries may share one of keys and values.
    """

    floats: tuple[torch.dtype, ...]
    copied: tuple[torch.dtype, ...]
    read_in_buffers: tuple[torch.dtype, ...]
    read_in_arguments: tuple[torch.dtype, ...]
    widens: bool
    tables: bool
    mask_lanes: int
    divides: bool
    fills: bool
    copies_all: bool
    exact_log: bool
    shared_heads: bool
