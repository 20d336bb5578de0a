"""What the atlas holds: one function per network, which returns how it is made and what it is called with.

To add a network, write a function with the decorator :func:`network` in one of this folder's files.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.networks import Arguments

Make = Callable[[], nn.Module]
Given = Callable[[int, "Draws"], Any]  # of the batch; a dictionary of arguments, or a tuple of positional ones


@dataclass(frozen=True)
class Network:
    """A public network.

    Attributes:
        name: of the entry, in snake case.
        source: the package that the class comes from, or the paper in whose style it is written here.
        build: imports the class; returns how a member is made, and the arguments of a call.
        number: the argument that may be a Python number as well as a tensor, empty where none may.
        looped: why members are evaluated one by one, empty where they are folded.
        unplanned: why there is no plan, as the report says it, empty where there is one.
        own_copies: whether a deep copy runs on weights of its own; not where closures hold the original's.
    """

    name: str
    source: str
    build: Callable[[], tuple[Make, Given]]
    number: str = ""
    looped: str = ""
    unplanned: str = ""
    own_copies: bool = True


class Draws:
    """Random inputs, a function of the seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        """Normal numbers."""
        return torch.randn(shape, generator=self.generator)

    def ids(self, high: int, *shape: int) -> Tensor:
        """Integers from zero to ``high``."""
        return torch.randint(0, high, shape, generator=self.generator)

    def unit(self, *shape: int) -> Tensor:
        """Numbers from 0.05 to 0.95: times of flows, noise levels."""
        return 0.05 + 0.9 * torch.rand(shape, generator=self.generator)


NETWORKS: dict[str, Network] = {}


def network(source: str, **options: Any) -> Callable[[Callable[[], tuple[Make, Given]]], Any]:
    """Register a network under its function's name; the options are fields of :class:`Network`."""

    def register(build: Callable[[], tuple[Make, Given]]) -> Any:
        assert build.__name__ not in NETWORKS, build.__name__
        NETWORKS[build.__name__] = Network(build.__name__, source, build, **options)
        return build

    return register


def arguments(given: Given, batch: int, seed: int, number: str = "") -> Arguments:
    """Positional and keyword arguments of a call.

    Args:
        given: of the network.
        batch: rows.
        seed: of the inputs.
        number: the argument that is a Python number this time, empty where all are tensors.
    """
    found = given(batch, Draws(seed))
    args, kwargs = ((), dict(found)) if isinstance(found, Mapping) else (found, {})
    if number:
        whole = not kwargs[number].is_floating_point()
        kwargs[number] = kwargs[number].flatten()[0].item() if whole else 0.25 + seed / 100
    return args, kwargs


def load() -> dict[str, Network]:
    """Every network, in the order of the files."""
    package = importlib.import_module("tests.atlas")
    for module in sorted(name for _, name, _ in pkgutil.iter_modules(package.__path__)):
        if module.startswith("of_"):
            importlib.import_module(f"tests.atlas.{module}")
    return NETWORKS


def dynamic(names: list[str], call: Arguments, batch: int, rows: Any) -> dict[str, Any]:
    """Dynamic shapes of a call's arguments, which are ``names`` in order: ``rows`` where dimension 0 is the batch."""

    def of(x: Any) -> Any:
        if isinstance(x, Mapping):
            return {name: of(value) for name, value in x.items()}
        if isinstance(x, list | tuple):
            return type(x)(of(value) for value in x)
        return {0: rows} if isinstance(x, Tensor) and x.ndim and x.shape[0] == batch else None

    args, kwargs = call
    return of({**dict(zip(names, args, strict=False)), **kwargs})
