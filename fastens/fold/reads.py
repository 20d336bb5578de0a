"""What Python reads while a pass is recorded: a plan rests on the values of constants, and has none of the input's."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastens.fold.callsite import calling_line
from fastens.fold.nested import leaves_of, name_of, plain
from fastens.fold.tensor import ReadsValues
from fastens.trace.record import in_progress

_TOLD = """
    item tolist __bool__ __float__ __int__ __index__ __complex__ __contains__ is_nonzero equal allclose
    __format__ __repr__
""".split()  # functions that tell Python values, and no memory
SHAPED_BY_VALUES: set[Any] = set()  # functions that take shapes from values of integers, where no mode may see it
# Functions whose results have as many entries as there are values of a kind, and whether they do with their arguments.
SIZED_BY_VALUES: dict[Any, Callable[..., bool]] = {}


def takes_shapes(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether such a function gets integers, as the lengths of packed sequences are.

    A recording knows the constants among them from then on.

    Raises:
        ReadsValues: a recording in which they are of the input.
    """
    recording, found = in_progress(), False
    for x in (plain(x) for x in leaves_of((args, kwargs)) if isinstance(x, Tensor)):
        if x.is_floating_point() or x.is_complex():
            continue
        found = True
        if recording is not None and recording.depends(x):
            raise ReadsValues(f"{name_of(func)} reads values of the input in {calling_line()}")
        if recording is not None:
            recording.ref(x)
    return found


def check_constants(func: Any, args: Any) -> None:
    """Raise unless a function gives Python numbers of constants, such as a mask that a module holds.

    The recording knows these from then on, so that its plan is dropped where one is written to.
    """
    recording, read = in_progress(), [plain(x) for x in leaves_of(args) if isinstance(x, Tensor)]
    if recording is None or name_of(func) not in _TOLD or any(map(recording.depends, read)):
        raise ReadsValues(f"{name_of(func)} reads values of the input in {calling_line()}")
    for x in read:
        recording.ref(x)
