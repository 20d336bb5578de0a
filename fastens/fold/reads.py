"""What Python reads while a pass is recorded: a plan rests on the values of constants, and has none of the input's."""

from typing import Any

from torch import Tensor

from fastens.fold.callsite import calling_line
from fastens.fold.nested import leaves_of, name_of, plain
from fastens.fold.tensor import ReadsValues
from fastens.trace.record import in_progress

_AS_NUMBERS = frozenset(
    "item tolist __bool__ __float__ __int__ __index__ __complex__ __contains__ is_nonzero equal allclose".split()
)
# Functions whose own code, below what any mode sees, takes shapes from the values of its integer tensors.
SHAPED_BY_VALUES = frozenset(
    "tensor_split _pack_padded_sequence _pad_packed_sequence gru lstm rnn_tanh rnn_relu ctc_loss".split()
)


def check_shapes(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Raise where a function takes shapes from values of the input, as from the lengths of packed sequences.

    The recording knows the constants among them from then on.
    """
    recording = in_progress()
    for x in (plain(x) for x in leaves_of((args, kwargs)) if isinstance(x, Tensor)):
        if recording is None or x.is_floating_point() or x.is_complex():
            continue
        if recording.depends(x):
            raise ReadsValues(f"{name_of(func)} reads values of the input in {calling_line()}")
        recording.ref(x)


def check_constants(func: Any, args: Any) -> None:
    """Raise unless a function gives Python numbers of constants, such as a mask that a module holds.

    The recording knows these from then on, so that its plan is dropped where one is written to.
    """
    recording, read = in_progress(), [plain(x) for x in leaves_of(args) if isinstance(x, Tensor)]
    if recording is None or name_of(func) not in _AS_NUMBERS or any(map(recording.depends, read)):
        raise ReadsValues(f"{name_of(func)} reads values of the input in {calling_line()}")
    for x in read:
        recording.ref(x)
