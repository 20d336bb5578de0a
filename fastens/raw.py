"""The bytes of tensors."""

import torch
from torch import Tensor


def raw(x: Tensor) -> Tensor:
    """A tensor's values in the order of its elements as bytes, uint8 [n], on its device; no copy where it can be.

    A tensor of one element is contiguous under any strides, as gradients of sums are, and torch views none of other
    strides than 1 as bytes.
    """
    flat = x.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8)
