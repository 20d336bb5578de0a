"""Reductions, scans and sorts over a member's dimensions: over the same ones behind the hidden dimension."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastens.fold.dispatch import Fold, rule
from fastens.fold.names import named
from fastens.fold.rules.shape import behind
from fastens.fold.tensor import MemberTensor, member_valued

_OVER_SOME = """
    sum mean nansum nanmean amax amin aminmax std var std_mean var_mean logsumexp prod all any count_nonzero norm
    argmax argmin max min median nanmedian
"""
_ALONG_ONE = "softmax log_softmax softmin cumsum cumprod cummax cummin logcumsumexp sort argsort topk glu kthvalue mode"
_SPREADS = ("std", "var", "std_mean", "var_mean")
_ALL = object()


@rule(*named(_OVER_SOME, "linalg.vector_norm"))
def reduce(fold: Fold, func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Reduce over all of a member's dimensions, or those that are named."""
    name = func.__name__.removeprefix("linalg_")
    kwargs = dict(kwargs)
    if (
        name in ("max", "min")
        and (len(args) + len(kwargs))
        and isinstance(args[0] if args else kwargs.get("other"), Tensor)
    ):
        pointwise = torch.maximum if name == "max" else torch.minimum
        return fold.again(pointwise, x, args[0] if args else kwargs["other"])
    if not member_valued(x):
        return NotImplemented
    before: tuple[Any, ...] = ()
    if name in ("norm", "vector_norm"):
        order = args[0] if args else kwargs.pop("p", kwargs.pop("ord", 2))
        before, args = (2 if order is None or (order == "fro" and name == "norm") else order,), args[1:]
        if isinstance(before[0], str) or (name == "norm" and len(args) > 2):
            return NotImplemented
    stack = fold.stack(x)
    if name in _SPREADS and args and isinstance(args[0], bool):  # ``std(unbiased)``
        kwargs["correction"], args = int(args[0]), args[1:]
    dim = kwargs.pop("dim", kwargs.pop("axis", args[0] if args else _ALL))
    args = args[1:]
    if name in _SPREADS and args and isinstance(args[0], bool):  # ``std(dim, unbiased, keepdim)``
        kwargs["correction"], args = int(args[0]), args[1:]
    keepdim = kwargs.pop("keepdim", kwargs.pop("keepdims", args[0] if args and isinstance(args[0], bool) else False))
    if len(args) > 1 or (args and not isinstance(args[0], bool)):
        return NotImplemented
    none_named = isinstance(dim, tuple | list) and not dim
    if none_named and name in ("all", "any"):
        return NotImplemented  # which then reduce over none; the others over all
    if dim is _ALL or dim is None or none_named:
        if keepdim:
            return _kept(fold, func, stack, before, kwargs)
        return _over_all(fold, func, stack, before, kwargs)
    dims = [behind(d, x.ndim) for d in dim] if isinstance(dim, tuple | list) else behind(dim, x.ndim)
    if name == "count_nonzero":
        return fold.wrap(func(stack, dims)) if x.ndim else NotImplemented
    if not x.ndim:
        stack, dims = stack.unsqueeze(1), 1
        keepdim = False
    if name == "aminmax":
        return _wrapped(fold, func(stack, dim=dims, keepdim=keepdim, **kwargs))
    return _wrapped(fold, func(stack, *before, dims, keepdim=keepdim, **kwargs))


def _over_all(fold: Fold, func: Any, stack: Tensor, before: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    flat, name = stack.reshape(len(stack), math.prod(stack.shape[1:])), func.__name__
    if name in _ONE_OF_ALL:  # whose derivative is that of all equal ones, and along a dimension that of one
        return fold.wrap(_ONE_OF_ALL[name](flat, 1, **kwargs))
    found = func(flat, dim=1, **kwargs) if name == "aminmax" else func(flat, *before, 1, **kwargs)
    if name in ("median", "nanmedian"):
        if flat.requires_grad:
            return NotImplemented
        found = found.values
    return _wrapped(fold, found)


_ONE_OF_ALL = {"max": torch.amax, "min": torch.amin}


def _kept(fold: Fold, func: Any, stack: Tensor, before: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    found = _over_all(fold, func, stack, before, kwargs)
    if not isinstance(found, MemberTensor):
        return NotImplemented
    return fold.wrap(fold.stack(found).reshape(len(stack), *(1,) * (stack.ndim - 1)))


def _wrapped(fold: Fold, found: Any) -> Any:
    if isinstance(found, Tensor):
        return fold.wrap(found)
    parts = [fold.wrap(part) for part in found]
    return type(found)(parts) if type(found) is not tuple else tuple(parts)


@rule(*named(_ALONG_ONE))
def along_one(fold: Fold, func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """A scan, a sort or a softmax along one dimension."""
    name = func.__name__
    if not x.ndim or any(isinstance(a, str) for a in args):
        return NotImplemented
    kwargs = dict(kwargs)
    position = 1 if name in ("topk", "kthvalue") else 0
    if name == "argsort" and args and isinstance(args[0], bool):
        return NotImplemented
    rest = list(args)
    default = -1 if name in ("sort", "argsort", "topk", "kthvalue", "glu", "mode") else None
    dim = rest.pop(position) if len(rest) > position else kwargs.pop("dim", kwargs.pop("axis", default))
    if isinstance(dim, bool) or not isinstance(dim, int):
        return NotImplemented
    kwargs["dim"] = behind(dim, x.ndim)
    if name in ("softmax", "log_softmax", "softmin") and fold.recording and kwargs["dim"] > 1:
        kwargs["dim"] -= 1
        return fold.unrows(func(fold.rows(x), *rest, **kwargs))
    if rest[position:]:
        return NotImplemented
    return _wrapped(fold, func(fold.stack(x), *rest, **kwargs))


@rule(F.normalize)
def normalize(fold: Fold, func: Any, x: Any, p: float = 2.0, dim: Any = 1, eps: float = 1e-12, out: Any = None) -> Any:
    """Vectors of norm one."""
    if x.ndim < 2:
        return NotImplemented
    dims = [behind(d, x.ndim) for d in dim] if isinstance(dim, tuple | list) else behind(dim, x.ndim)
    return fold.wrap(func(fold.stack(x), p, dims, eps))
