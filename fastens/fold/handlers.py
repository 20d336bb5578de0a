"""What a tensor of all members does outside a pass, and below Python's functions."""

from typing import Any

import torch
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.overrides import _get_current_function_mode_stack

from fastens.fold.dispatch import Fold, current_fold, dispatch, run_common
from fastens.fold.nested import leaves_of
from fastens.fold.slices import entry_by_entry
from fastens.fold.tensor import HANDLERS, MemberTensor, NotFoldable, ReadsValues


def outside_a_pass(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Evaluate a function for all members, as inside a pass: a checkpoint's second run has none around it."""
    try:
        return dispatch(Fold.of(args, kwargs), func, args, kwargs)
    except NotFoldable as error:
        if current_fold() is not None:
            raise
        raise RuntimeError(
            f"{error}: it is of all members at once; do this to the members, and make the ensemble of them, also where "
            "it is a parametrization that does it"
        ) from error


def below_autograd(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Evaluate entry by entry what scripted functions and extensions call, where nothing is differentiated."""
    fold = Fold.of(args, kwargs)
    leaves = [x for x in leaves_of((args, kwargs)) if isinstance(x, MemberTensor)]
    if any(is_functorch_wrapped_tensor(x.stack) for x in leaves):
        raise NotFoldable(f"{func} is of a transform of torch.func inside the network")
    if torch.is_grad_enabled() and any(x.stack.requires_grad for x in leaves):
        raise NotFoldable(f"{func} of a scripted function or an extension cannot be differentiated for all members")
    reads = torch.Tag.data_dependent_output in func.tags or func is torch.ops.aten._local_scalar_dense.default
    if reads and any(x.hidden is not None for x in leaves):
        raise ReadsValues(f"{func} of a tensor that differs between members has no one answer")
    if func is torch.ops.aten.detach.default:
        return MemberTensor(args[0].stack.detach(), args[0].hidden, args[0].alias)
    if all(x.hidden is None for x in leaves):
        return run_common(fold, func, args, kwargs, True)
    result, around = entry_by_entry(fold, func, args, kwargs), current_fold()
    if around is not None:
        around.slices.update(fold.slices)
    return result


def inside_a_pass() -> bool:
    """Whether a network's own code runs in a pass: rules, and what is around a pass, run outside its mode."""
    return any(isinstance(mode, Fold) for mode in _get_current_function_mode_stack())


def read(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Evaluate a function that torch does not hand over, as it would inside the pass in progress."""
    return torch.overrides.handle_torch_function(func, args[:1], *args, **kwargs)


HANDLERS.update(function=outside_a_pass, dispatch=below_autograd, inside=inside_a_pass, read=read)
