"""Random numbers drawn inside a network: each member's own."""

import functools
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastens.fold.dispatch import RANDOM, Fold, run_common
from fastens.fold.names import named
from fastens.fold.nested import mapped, plain
from fastens.fold.slices import entry_by_entry
from fastens.fold.tensor import MemberTensor, NotFoldable, member_valued
from fastens.fold.writes import check_written, promote, writes_to

_FACTORIES = "rand randn randint"
_LIKE = "rand_like randn_like randint_like bernoulli"
_IN_PLACE = "normal_ uniform_ bernoulli_ exponential_ random_ cauchy_ geometric_ log_normal_"
_DROPOUTS = """
    dropout alpha_dropout feature_alpha_dropout dropout_ alpha_dropout_ feature_alpha_dropout_ feature_dropout
    feature_dropout_ dropout1d dropout2d dropout3d rrelu rrelu_
"""
_OTHERS = """
    normal poisson multinomial randperm binomial _standard_gamma _sample_dirichlet rrelu_with_noise rrelu_with_noise_
    native_dropout _fused_dropout gumbel_softmax fractional_max_pool2d fractional_max_pool3d
    fractional_max_pool2d_with_indices fractional_max_pool3d_with_indices svd_lowrank pca_lowrank
"""


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


def _takes_draws(fold: Fold, x: Any) -> None:
    """Let each member's own numbers be written to a tensor."""
    check_written(fold, x)
    if not member_valued(x):
        promote(fold, x)
    elif not fold.aliases(x):
        raise NotFoldable("random numbers are written to a view that had to be copied")


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
    return fold.wrap(func(*ranges, size=(fold.hidden.size, *size), **kwargs))


@draws(*named(_FACTORIES))
def factory(fold: Fold, func: Any, *args: Any, **kwargs: Any) -> Any:
    """``torch.randn(B, ...)``."""
    return _with_hidden(fold, func, args, kwargs)


@draws(*named(_LIKE))
def like(fold: Fold, func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """``torch.randn_like(x)``."""
    _draws_as_members_do(fold, kwargs.get("generator"))
    if kwargs.get("memory_format") not in (None, torch.preserve_format, torch.contiguous_format):
        return entry_by_entry(fold, func, (x, *args), kwargs)
    args, kwargs = mapped(plain, (args, kwargs))
    return fold.wrap(func(fold.entries(x).contiguous() if not member_valued(x) else fold.stack(x), *args, **kwargs))


@draws(*named(_IN_PLACE))
def in_place(fold: Fold, func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """``x.normal_()``."""
    _draws_as_members_do(fold, kwargs.get("generator"))
    _takes_draws(fold, x)
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
    in_place = func.__name__.endswith("_") or named_args.get("inplace")
    if not trains or (named_args.get("p") == 0 and not leaky):  # which returns its input itself
        if not member_valued(x):
            kwargs = kwargs if leaky else {name: value for name, value in kwargs.items() if name != "inplace"}
            return run_common(fold, func, args, kwargs, isinstance(x, MemberTensor))
        if not leaky:
            return x
    _draws_as_members_do(fold, None)
    if in_place:
        _takes_draws(fold, x)
    elif not member_valued(x):
        x = fold.wrap(fold.entries(x).contiguous())
    whole_channels = func.__name__.startswith(("feature", "dropout1d", "dropout2d", "dropout3d"))
    rest_args, rest_kwargs = args[1:], {n: v for n, v in kwargs.items() if n != "input"}
    if in_place or (whole_channels and x.ndim < 3):
        return entry_by_entry(fold, func, (x, *rest_args), rest_kwargs)
    if whole_channels:
        return fold.unrows(func(fold.rows(x), *rest_args, **rest_kwargs))
    return fold.wrap(func(fold.stack(x), *rest_args, **rest_kwargs))


@draws(torch.nn.init.normal_, torch.nn.init.uniform_, torch.nn.init.kaiming_uniform_)  # the others call these
def initialised(fold: Fold, func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """``nn.init.normal_(x)``, which torch hands over whole."""
    _draws_as_members_do(fold, kwargs.get("generator"))
    _takes_draws(fold, x)
    return entry_by_entry(fold, func, (x, *args), kwargs)


@draws(*named("lstm gru rnn_tanh rnn_relu"))
def recurrent(fold: Fold, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Recurrent layers with dropout between them; those without are no draws."""
    drops = any(isinstance(p, float) and p and train for p, train in pairwise(args))  # side by side in all their forms
    return each(fold, func, *args, **kwargs) if drops else NotImplemented


@draws(*named(_OTHERS), torch.Tag.nondeterministic_seeded)
def each(fold: Fold, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Functions that draw in other ways, and operations that torch says draw, entry by entry."""
    _draws_as_members_do(fold, kwargs.get("generator"))
    if args and writes_to(func, args, kwargs):
        _takes_draws(fold, args[0])
    return entry_by_entry(fold, func, args, kwargs)
