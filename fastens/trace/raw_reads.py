"""Functions that read values of a tensor on their way, which no operation that they do tells."""

from collections.abc import Callable
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor

# Their C++ reads an integer argument's memory, and cuts by what it finds: lengths, sizes of batches, places.
_READ_FROM_MEMORY = {
    *("tensor_split", "_pack_padded_sequence", "_pad_packed_sequence", "ctc_loss"),
    *("lstm", "gru", "rnn_tanh", "rnn_relu"),  # of a packed sequence
}


def reads_values(func: Any, call: Any, depends: Callable[[Tensor], bool]) -> bool:
    """Whether a function reads values of what depends on the inputs.

    Args:
        func: the function.
        call: its arguments.
        depends: whether a tensor depends on the inputs.
    """
    if getattr(func, "__name__", "") not in _READ_FROM_MEMORY:
        return False
    leaves = (leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor))
    return any(not leaf.is_floating_point() and type(leaf) is Tensor and depends(leaf) for leaf in leaves)
