"""What is around a torch function in progress: the line that called it, the checkpoint, the graph, the transform."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor, is_gradtrackingtensor
from torch.utils.checkpoint import _CheckpointFrame

from fastens.fold.tensor import MemberTensor, NotFoldable, getters

_requires_grad, _grad_fn = getters("requires_grad grad_fn")
_MACHINERY = ("torch", *(f"fastens.{package}" for package in ("engine", "network", "fold", "trace", "plan")))


def callers() -> Iterator[FrameType]:
    """The Python functions in progress, the innermost first; this one's caller among them.

    Who uses it looks at code of others, which calls us as it calls anything: nothing but its frames tells who it is.
    """
    frame = inspect.currentframe()
    while frame is not None and frame.f_back is not None:
        frame = frame.f_back
        yield frame


def calling_line() -> str:
    """File and line of the network's Python that called the function in progress; said in errors, nothing rests on it.

    A torch function knows its arguments and not its caller, so only the frames tell.
    """
    for frame in callers():
        if not frame.f_globals.get("__name__", "").startswith(_MACHINERY):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
    return "an unknown place"


def checkpoint_in_progress() -> Any:
    """The innermost activation checkpoint in progress, whose functions the backward pass runs again.

    Read from the closure of the hooks that it pushed: torch has no function that gives it.
    """
    hooks = _top_saved_tensors_default_hooks(True)
    if hooks is None or hooks[0].__module__ != "torch.utils.checkpoint":
        return None
    held = (cell.cell_contents for cell in hooks[0].__closure__ or ())
    return next((x for x in held if isinstance(x, _CheckpointFrame)), None)  # none in such a second run


def saved_through_hooks() -> bool:
    """Whether hooks that are not torch's see what autograd saves: in a pass those get the tensors of all members.

    They may look at the whole of one, as those that quantise it do; torch's own move it or make it again.
    """
    hooks = _top_saved_tensors_default_hooks(True)
    return hooks is not None and (getattr(hooks[0], "__module__", None) or "").split(".")[0] not in ("torch", "fastens")


@contextmanager
def counted_if_it_succeeds() -> Iterator[None]:
    """Scope of a pass; where it raises, the checkpoint around it does not count what the pass saved.

    A checkpoint compares the number of tensors that its function saved with that of the second run.
    """
    frame = checkpoint_in_progress()
    saved = 0 if frame is None else len(frame.weak_holders)
    try:
        yield
    except Exception:
        if frame is not None:
            del frame.weak_holders[saved:], frame.x_metadatas[saved:]
        raise


def check_transforms(leaves: list[Any]) -> None:
    """Raise where a transform of the network's own has a member-valued tensor in it, whose members it does not see."""
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            continue
        inner = leaf.stack if type(leaf) is MemberTensor else leaf
        while is_functorch_wrapped_tensor(inner):
            differentiated, inner = is_gradtrackingtensor(inner), get_unwrapped(inner)
            if type(inner) is MemberTensor and differentiated:  # vmap is of operations, which see the stack
                raise NotFoldable("torch.func differentiates inside the network what differs between members")


def check_derivatives(leaves: list[Any]) -> None:
    """Raise where derivatives are not those of one member.

    Torch differentiated a wrapper, below its functions, so that they went by that and not by the stack; or hooks of the
    network's own see what is saved for them.
    """
    if saved_through_hooks():
        raise NotFoldable("hooks on what autograd saves would see all members at once")
    for leaf in leaves:
        if (
            type(leaf) is MemberTensor
            and not leaf.stack.requires_grad
            and not isinstance(leaf.stack, torch.nn.Parameter)
        ):
            with torch._C.DisableTorchFunctionSubclass():
                detached, made = _requires_grad(leaf), _grad_fn(leaf)
            if detached and made is None:  # saved by a checkpoint inside another, whose second run is no one's graph
                leaf.stack.requires_grad_()
            elif detached:
                raise NotFoldable("a function below torch's own differentiates what differs between members")
