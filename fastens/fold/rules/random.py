"""Random numbers drawn inside a network: each member's own."""

import functools
from typing import Any

import torch
from torch import Tensor

from fastens.fold.dispatch import RANDOM, Fold, named, run_common
from fastens.fold.nested import mapped, plain
from fastens.fold.slices import entry_by_entry
from fastens.fold.tensor import MemberTensor, NotFoldable, member_valued
from fastens.fold.writes import check_weights, promote

_FACTORIES = "rand randn randint"
_LIKE = "rand_like randn_like randint_like bernoulli"
_IN_PLACE = "normal_ uniform_ bernoulli_ exponential_ random_ cauchy_ geometric_ log_normal_"
_DROPOUTS = """
    dropout alpha_dropout feature_alpha_dropout dropout_ alpha_dropout_ feature_alpha_dropout_ feature_dropout
    feature_dropout_ native_dropout dropout1d dropout2d dropout3d rrelu rrelu_
"""
_OTHERS = "normal poisson multinomial randperm gumbel_softmax fractional_max_pool2d fractional_max_pool3d"


def draws(*functions: Any) -> Any:
    """Register what a function that draws does in a pass, also where its arguments are common."""

    def register(function: Any) -> Any:
        @functools.wraps(function)
        def drawing(fold: Fold, func: Any, *args: Any, **kwargs: Any) -> Any:
            result = function(fold, func, *args, **kwargs)
            if fold.seeds is not None:
                fold.seeds.drawn()
            return result

        RANDOM.update(dict.fromkeys(functions, drawing))
        return drawing

    return register


def _draws_as_members_do(fold: Fold, generator: Any) -> None:
    """Refuse to draw where each member draws what it chose: from a generator of its own, or by a seed that it set.

    Raises:
        NotFoldable: so that members draw one by one.
    """
    if fold.hidden.size == 1 or fold.seeds is None:
        return
    if generator is not None:
        raise NotFoldable("the network draws from a generator that it is given or makes")
    if fold.seeds.set_since():
        raise NotFoldable("the network seeds the global generator")


def _with_hidden(fold: Fold, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A factory asked for the numbers of all members."""
    _draws_as_members_do(fold, kwargs.get("generator"))
    kwargs = {name: plain(value) for name, value in kwargs.items()}
    ranges = []
    if func.__name__ == "randint":
        given = [a for a in args if isinstance(a, int)]
        ranges, args = given, tuple(a for a in args if not isinstance(a, int))
    size = kwargs.pop("size", None)
    if size is None:
        size = args[0] if len(args) == 1 and not isinstance(args[0], int | torch.SymInt) else args
    return fold.wrap(func(*ranges, (fold.hidden.size, *size), **kwargs))


@draws(*named(_FACTORIES))
def factory(fold: Fold, func: Any, *args: Any, **kwargs: Any) -> Any:
    """``torch.randn(B, ...)``."""
    return _with_hidden(fold, func, args, kwargs)


@draws(*named(_LIKE))
def like(fold: Fold, func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """``torch.randn_like(x)``."""
    _draws_as_members_do(fold, kwargs.get("generator"))
    args, kwargs = mapped(plain, (args, kwargs))
    return fold.wrap(func(fold.entries(x).contiguous() if not member_valued(x) else fold.stack(x), *args, **kwargs))


@draws(*named(_IN_PLACE))
def in_place(fold: Fold, func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """``x.normal_()``."""
    _draws_as_members_do(fold, kwargs.get("generator"))
    check_weights(fold, x)
    if not member_valued(x):
        promote(fold, x)
    elif not fold.aliases(x):
        raise NotFoldable("random numbers are written to a view that had to be copied")
    if any(isinstance(a, Tensor) for a in args):
        entry_by_entry(fold, func, (x, *args), kwargs)
    else:
        func(fold.stack(x), *args, **kwargs)
    return x


@draws(*named(_DROPOUTS))
def dropout(fold: Fold, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Each member's own mask: of its ensemble of masks, or drawn as torch draws."""
    if func in fold.dropouts.functions:
        return fold.dropouts.dropout(fold, func, args, kwargs)
    x = args[0] if args else kwargs["input"]
    named_args = dict(zip(("input", "p", "training", "inplace"), args, strict=False)) | kwargs
    leaky = func.__name__ in ("rrelu", "rrelu_")
    trains = named_args.get("training", named_args.get("train", False))
    if not trains or (named_args.get("p") == 0 and not leaky):  # which returns its input itself
        if not member_valued(x):
            return run_common(fold, func, args, kwargs, isinstance(x, MemberTensor))
        if not leaky:
            return x
    _draws_as_members_do(fold, None)
    if not member_valued(x):
        if func.__name__.endswith("_") or named_args.get("inplace"):
            promote(fold, x)
        else:
            x = fold.wrap(fold.entries(x).contiguous())
    whole_channels = func.__name__.startswith(("feature", "dropout1d", "dropout2d", "dropout3d"))
    rest_args, rest_kwargs = args[1:], {n: v for n, v in kwargs.items() if n != "input"}
    if func.__name__.endswith("_") or named_args.get("inplace") or (whole_channels and x.ndim < 3):
        return entry_by_entry(fold, func, (x, *rest_args), rest_kwargs)
    if whole_channels:
        return fold.unrows(func(fold.rows(x), *rest_args, **rest_kwargs))
    return fold.wrap(func(fold.stack(x), *rest_args, **rest_kwargs))


@draws(*named(_OTHERS))
def each(fold: Fold, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Functions that draw in other ways, entry by entry."""
    _draws_as_members_do(fold, kwargs.get("generator"))
    return entry_by_entry(fold, func, args, kwargs)
