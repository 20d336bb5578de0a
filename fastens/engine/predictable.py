"""Random numbers that fold and members draw alike, so that the one can be held against the other."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastens.network.state import TorchDraws

_MOST = 10_000  # draws; a network that draws until it likes the number would go on for good
_UNIFORM, _NORMAL = 0.375, 0.625


class Unpredictable(RuntimeError):
    """A network draws in a way that is not known here, or again and again."""


class PredictableDraws(TorchDispatchMode):
    """Mode in which draws depend on their distribution alone, and not on the generator or on how many are drawn.

    A fold may so draw for all members at once what members draw one by one. Dropout keeps everything, scaled as if it
    had not; a Bernoulli variable is what is more probable; a permutation turns the order round.

    Raises:
        Unpredictable: inside it, where the draws of an operation are not known.
    """

    def __init__(self) -> None:
        super().__init__()
        self._count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        self._count += 1
        if self._count > _MOST:
            raise Unpredictable(f"the network draws more than {_MOST} times")
        given = {a.name: a.default_value for a in func._schema.arguments}
        given |= dict(zip(given, args, strict=False)) | kwargs
        if given.get("dropout_p"):  # attention
            name = "dropout_p"
            left = [0.0 if a.name == name else x for a, x in zip(func._schema.arguments, args, strict=False)]
            found = func(*left, **({**kwargs, name: 0.0} if name in kwargs else kwargs))
            first, *rest = found if isinstance(found, tuple) else (found,)
            first = first / (1 - given[name])
            return (first, *rest) if isinstance(found, tuple) else first
        draw = _DRAWS.get(func._schema.name.removeprefix("aten::").removesuffix("_").removesuffix("_functional"))
        if draw is None:
            before = TorchDraws()
            result = func(*args, **kwargs)
            if before.drawn():
                raise Unpredictable(f"{func} draws random numbers")
            return result
        return draw(func(*args, **kwargs), given)


def _filled(value: Callable[[dict[str, Any]], Any]) -> Callable[[Tensor, dict[str, Any]], Tensor]:
    """Put what a function of the operation's arguments gives in the place of all that was drawn."""

    def draw(result: Tensor, given: dict[str, Any]) -> Tensor:
        return result.copy_(torch.as_tensor(value(given)))

    return draw


def _normal(result: Tensor, given: dict[str, Any]) -> Tensor:
    return result.copy_(torch.as_tensor(given.get("mean", 0.0) + _NORMAL * given.get("std", 1.0)))


def _bernoulli(result: Tensor, given: dict[str, Any]) -> Tensor:
    """What is more probable; where one probability is given for all, that something happens at all."""
    p = given.get("p", given.get("self"))
    return result.copy_(p >= 0.5) if isinstance(p, Tensor) else result.fill_(float(p is not None and p > 0))


def _native_dropout(result: tuple[Tensor, Tensor], given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    out, mask = result
    p = given["p"] if given["train"] else 0.0
    return out.copy_(given["input"] * (1 / (1 - p) if p < 1 else 0.0)), mask.fill_(True)


def _multinomial(result: Tensor, given: dict[str, Any]) -> Tensor:
    count = given["num_samples"]
    if given["replacement"]:
        return result.copy_(given["self"].argmax(-1, keepdim=True).expand_as(result))
    return result.copy_(given["self"].topk(count, -1).indices)


def _randperm(result: Tensor, given: dict[str, Any]) -> Tensor:
    return result.copy_(torch.arange(given["n"] - 1, -1, -1, device=result.device))


def _rrelu(result: Tensor, given: dict[str, Any]) -> Tensor:
    slope = (given["lower"] + given["upper"]) / 2
    given["noise"].fill_(slope)
    x = given["self"]
    return result if not given["training"] else result.copy_(torch.where(x <= 0, x * slope, x))


_DRAWS: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    **dict.fromkeys(("rand", "rand_like"), _filled(lambda given: _UNIFORM)),
    **dict.fromkeys(("randn", "randn_like", "normal"), _normal),
    **dict.fromkeys(("randint", "randint_like"), _filled(lambda given: given.get("low", 0))),
    "uniform": _filled(lambda given: given["from"] + _UNIFORM * (given["to"] - given["from"])),
    "random": _filled(lambda given: given.get("from", 0)),
    "bernoulli": _bernoulli,
    "native_dropout": _native_dropout,
    "rrelu_with_noise": _rrelu,
    "multinomial": _multinomial,
    "randperm": _randperm,
    "exponential": _filled(lambda given: 1 / given["lambd"]),
    "geometric": _filled(lambda given: 1),
    "cauchy": _filled(lambda given: given["median"]),
    "log_normal": _filled(lambda given: math.exp(given["mean"])),
    "poisson": _filled(lambda given: given["self"].floor()),
    "binomial": _filled(lambda given: (given["count"] * given["prob"]).floor()),
    "_standard_gamma": _filled(lambda given: given["self"]),
}
