"""The loop itself behind the ensemble's surface, and the same with a planted fault: what the suite is tried on."""

import contextlib
import copy
import threading
import types
from collections.abc import Iterator
from random import Random
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

import fastens
from tests.fuzz import oracle


def own(arguments: Any, k: int) -> Any:
    """Member k's of the arguments that every member has of its own."""
    return pytree.tree_map(lambda a: a.stack[k] if isinstance(a, fastens.PerMember) else a, arguments)


class PlainLoop(nn.Module):
    """Calls every member and combines what they return."""

    rule = "mean"

    def __init__(self, members: list[nn.Module], engine: str = "auto", max_fold: int | None = None) -> None:
        super().__init__()
        self.networks = nn.ModuleList(members)
        self.train(members[0].training)
        self.__dict__["drawn"] = {}

    def evaluate(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        return [network(*own(args, k), **own(kwargs, k)) for k, network in enumerate(self.networks)]

    def combine(self, outputs: list[Any], batch: Any) -> Any:
        if self.rule in oracle.RULES:
            return oracle.combined(outputs, oracle.RULES[self.rule])
        draw, size, dim, kept = self.drawn.get(threading.get_ident())
        rows = batch.shape[dim]
        if self.rule == "alternating" or not kept:
            kept[:] = [draw.randrange(len(outputs)) for _ in range(size)]
        chosen = [kept[row % size] for row in range(rows)]

        def pick(scores: Tensor) -> Tensor:
            return torch.stack([scores[k].select(dim, row) for row, k in enumerate(chosen)], dim)

        return oracle.combined(outputs, pick)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.combine(self.evaluate(args, kwargs), args[0])

    def member_outputs(self, *args: Any, **kwargs: Any) -> Any:
        return oracle.combined(self.evaluate(args, kwargs), oracle.stacked)

    def forward_with_variance(self, *args: Any, **kwargs: Any) -> Any:
        outputs = self.evaluate(args, kwargs)
        return oracle.combined(outputs, oracle.RULES[self.rule]), oracle.combined(outputs, oracle.variance)

    @contextlib.contextmanager
    def trajectory(self, batch_size: int, generator: int) -> Iterator[None]:
        dim = int(self.networks[0].batch_second)
        self.drawn[threading.get_ident()] = (Random(generator), batch_size, dim, [])
        yield

    def velocity(self, *args: Any) -> Any:
        return oracle.combined([n.velocity(*args) for n in self.networks], oracle.RULES[self.rule])

    def set_scale(self, scale: float) -> None:
        for network in self.networks:
            network.set_scale(scale)

    @property
    def scale(self) -> float:
        return self.networks[0].scale

    @property
    def blocks(self) -> nn.ModuleList:
        return nn.ModuleList([network.blocks for network in self.networks])

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "scale":
            self.set_scale(value)
        else:
            super().__setattr__(name, value)

    def report(self) -> Any:
        return types.SimpleNamespace(engine="loop", looped=[], plans=[], why="it is one", why_no_plan="it is a loop")

    @property
    def members(self) -> nn.ModuleList:
        return self.networks

    def save_pretrained(self, folder: str) -> None:
        torch.save(self, f"{folder}/loop.pt")

    @classmethod
    def from_pretrained(cls, folder: str, factory: Any) -> Any:
        return torch.load(f"{folder}/loop.pt", weights_only=False)

    def refresh(self) -> None:
        """Nothing is kept."""


class Rounded(PlainLoop):
    """The loop with another rounding: every module's output is off by some units in the last place."""

    def __init__(self, members: list[nn.Module], engine: str = "auto", max_fold: int | None = None) -> None:
        super().__init__(members, engine, max_fold)
        for module in self.networks.modules():
            module.register_forward_hook(rounded)


def rounded(module: nn.Module, args: Any, output: Any) -> Any:
    def shift(leaf: Any) -> Any:
        if not oracle.is_score(leaf) or leaf.is_inference():
            return leaf
        most = 1 if leaf.dtype == torch.bfloat16 else 3
        noise = np.random.default_rng(leaf.numel()).integers(-most, most + 1, leaf.shape)  # vmap lets torch draw none
        return leaf * (1 + torch.from_numpy(noise).to(leaf.dtype) * torch.finfo(leaf.dtype).eps)

    return pytree.tree_map(shift, output)


class MemberZeroForAll(PlainLoop):
    """Members' Python stands for one another's: the state of one, the tensors of each."""

    def evaluate(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        outputs = []
        for network in self.networks:
            state = {name: t.detach() for name, t in network.state_dict().items()}
            outputs.append(torch.func.functional_call(self.networks[0], state, args, kwargs))
        return outputs


class StaleWeights(PlainLoop):
    """Weights as they were at the first call."""

    def evaluate(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        if "kept" not in self.__dict__:
            self.__dict__["kept"] = copy.deepcopy(self.networks)
        return [network(*args, **kwargs) for network in self.kept]


class StaleTimes(PlainLoop):
    """The time of the first call of a form."""

    def evaluate(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        times = self.__dict__.setdefault("times", {})
        t = times.setdefault(pytree.tree_map(lambda a: getattr(a, "shape", None), args), args[1])
        return super().evaluate((args[0], t, *args[2:]), kwargs)


class RowsApart(PlainLoop):
    """Rows evaluated one by one, whatever they have to do with one another."""

    def evaluate(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        if self.networks[0].batch_second or len(args[0]) == 1 or kwargs.get("context") is not None or len(args) > 2:
            return super().evaluate(args, kwargs)
        times = args[1] if torch.is_tensor(args[1]) and args[1].ndim else [args[1]] * len(args[0])
        rows = [super(RowsApart, self).evaluate((x[None], t), kwargs) for x, t in zip(args[0], times, strict=True)]
        return [
            pytree.tree_map(lambda *s: torch.cat(s) if oracle.is_score(s[0]) else s[0], *r)
            for r in zip(*rows, strict=True)
        ]


def stacked(*leaves: Any) -> Any:
    return torch.cat(leaves) if oracle.is_score(leaves[0]) else leaves[0]


class KeepsWhatItReturns(PlainLoop):
    """One buffer for all answers of a form."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        answers = self.__dict__.setdefault("answers", {})
        key = (args[0].shape, args[0].dtype, self.rule)
        if key in answers and not torch.is_grad_enabled() and torch.equal(answers[key][0], args[0]):
            return answers[key][1]
        answers[key] = (args[0].detach().clone(), super().forward(*args, **kwargs))
        return answers[key][1]


class OneAnswerForThreads(PlainLoop):
    """The input of a call is kept where another thread overwrites it."""

    def evaluate(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        self.__dict__["input"] = args
        return [network(*self.input, **kwargs) for network in self.networks]


class Unflagged(PlainLoop):
    """Keyword numbers are those of the first call."""

    def evaluate(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        first = self.__dict__.setdefault("first", {n: v for n, v in kwargs.items() if n in ("flip", "gain")})
        others = {n: v for n, v in kwargs.items() if n not in ("flip", "gain")}
        return super().evaluate(args, {**others, **first})
