"""What is around a torch function in progress: the line that called it, the checkpoint, the graph of autograd."""

import sys
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import _CheckpointFrame

from fastens.fold.tensor import MemberTensor, NotFoldable

_MACHINERY = ("torch", *(f"fastens.{package}" for package in ("engine", "network", "fold", "trace", "plan")))


def calling_line() -> str:
    """File and line of the network's Python that called the function in progress."""
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if not module.startswith(_MACHINERY):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return "an unknown place"


def checkpoint_in_progress() -> Any:
    """The innermost activation checkpoint in progress, whose functions the backward pass runs again."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is None or hooks[0].__module__ != "torch.utils.checkpoint":
        return None
    held = (cell.cell_contents for cell in hooks[0].__closure__ or ())
    return next((x for x in held if isinstance(x, _CheckpointFrame)), None)  # none in such a second run


def check_derivatives(leaves: list[Any]) -> None:
    """Raise where an ``autograd.Function`` made a tensor: its derivatives went by the wrapper, not by the stack."""
    for leaf in leaves:
        if (
            type(leaf) is MemberTensor
            and not leaf.stack.requires_grad
            and not isinstance(leaf.stack, torch.nn.Parameter)
        ):
            with torch._C.DisableTorchFunctionSubclass():
                detached = Tensor.requires_grad.__get__(leaf)
                made = Tensor.grad_fn.__get__(leaf)  # pyright: ignore[reportOptionalMemberAccess]  # typed as its value
            if detached and made is None:  # saved by a checkpoint inside another, whose second run is no one's graph
                leaf.stack.requires_grad_()
            elif detached:
                raise NotFoldable("an autograd.Function of the network differentiates by itself")
