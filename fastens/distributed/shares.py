"""Which members a rank holds, and what the ranks must have in common before they begin."""

from __future__ import annotations

import functools
import hashlib
import inspect
import itertools
import sys
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastens
from fastens import reproducible
from fastens._version import __version__
from fastens.distributed.exchange import Exchange, RankLost, RanksDiffer
from fastens.engine.arguments import Arguments
from fastens.raw import raw


class Share:
    """The members of one rank of several: those that torch's ``Shard(0)`` gives it.

    A rank for which none is left holds the last one as a spare, which is evaluated and counts for nothing: the others
    take as long, and the shape of the outputs is known everywhere.

    Args:
        num_members: K.
        ranks: n.
        rank: of this process.

    Attributes:
        counts: how many members each rank contributes.
        first: the number of the first member that is held.
        held: how many are.
    """

    def __init__(self, num_members: int, ranks: int, rank: int) -> None:
        size = -(-num_members // ranks)
        starts = [min(i * size, num_members) for i in range(ranks + 1)]
        self.counts = [b - a for a, b in itertools.pairwise(starts)]
        self.count = self.counts[rank]
        self.held = max(self.count, 1)
        self.first = min(starts[rank], num_members - 1)
        self.starts = torch.tensor(starts)

    def owner(self, members: Tensor) -> Tensor:
        """The rank of each of some members, int64."""
        return torch.searchsorted(self.starts, members, right=True) - 1

    @property
    def slice(self) -> slice:
        """The members that are held."""
        return slice(self.first, self.first + self.held)


def checksum(tensors: Iterable[Tensor]) -> int:
    """A number that differs where bits, shapes or dtypes do."""
    found = 0
    for tensor in tensors:
        found = zlib.crc32(f"{tuple(tensor.shape)}{tensor.dtype}".encode(), found)
        if tensor.numel() and not tensor.is_meta:
            found = zlib.crc32(raw(tensor).cpu().numpy().data, found)
    return found


def code_of(member: nn.Module) -> str:
    """A digest of this package's code and of that of the member's class."""
    digest = hashlib.sha256(_package())
    kinds = {(kind.__module__, kind.__qualname__): kind for kind in map(type, member.modules())}
    for (module, _), kind in sorted(kinds.items(), key=lambda item: item[0]):
        if not module.startswith("torch."):
            digest.update(_source(kind))
    return digest.hexdigest()[:16]


@functools.cache
def _package() -> bytes:
    root = Path(fastens.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.digest()


def _source(kind: type) -> bytes:
    try:
        return inspect.getsource(sys.modules[kind.__module__]).encode()
    except (OSError, TypeError, KeyError):  # it was typed
        return kind.__qualname__.encode()


def facts_of(member: nn.Module, num_members: int, settings: Mapping[str, Any], rule: Any) -> dict[str, Any]:
    """What must be the same on every rank, by the name under which an error says it."""
    kept = {name: repr(value) for name, value in settings.items()}
    shapes = [(name, tuple(t.shape), str(t.dtype)) for name, t in member.state_dict().items()]
    return {
        "the version of fastens": __version__,
        "the version of torch": torch.__version__,
        "the code of the package or of the members' classes": code_of(member),
        "the number of members": num_members,
        "the members' structure": (type(member).__qualname__, shapes),
        "the ensemble's rule": repr(rule),
        "the ensemble's settings": kept,
    }


def check_alike(exchange: Exchange, facts: Mapping[str, Any]) -> None:
    """Raise RanksDiffer on every rank where one has other facts than the first, and name them."""
    every = exchange.objects(dict(facts))
    for name in facts:
        others = [rank for rank, found in zip(exchange.ranks, every, strict=True) if found.get(name) != every[0][name]]
        if others:
            raise RanksDiffer(
                f"distribute: {name} of rank {', '.join(map(str, others))} differ from rank {exchange.ranks[0]}'s "
                f"({_shown(every[exchange.ranks.index(others[0])].get(name))}, {_shown(every[0][name])}); start all "
                "ranks with the same code, checkpoints and options"
            )


def check_call(exchange: Exchange, number: int, arguments: Arguments, what: Any, failed: bool, planned: bool) -> bool:
    """Let ranks know of each other's failure in a call, and that they are called with the same.

    Args:
        exchange: of all whose calls are the same.
        number: of the call.
        arguments: of it.
        what: is asked for.
        failed: whether this rank did.
        planned: whether it was answered by plans alone.

    Returns:
        Whether all ranks were answered by plans, or none.

    Raises:
        RankLost: another rank failed.
        RanksDiffer: they are called with different things.
    """
    tensors = [x for i, x in enumerate(arguments.leaves) if isinstance(x, Tensor) and i not in arguments.own]
    reads = all(x.device.type == "cpu" for x in tensors) or number & (number - 1) == 0
    said = repr((what, [(tuple(x.shape), str(x.dtype)) for x in tensors], reproducible.enabled()))
    kind = checksum([torch.frombuffer(bytearray(said.encode()), dtype=torch.uint8)])
    every = exchange.agree([int(failed), kind, checksum(tensors) if reads else 0, int(planned)])
    ranks = exchange.ranks
    lost = [rank for rank, bad in zip(ranks, every[:, 0].tolist(), strict=True) if bad]
    if lost and not failed:
        raise RankLost(f"rank {', '.join(map(str, lost))} failed in this call; its own error says why")
    for column, name in ((1, "shapes, rule, method or mode"), (2, "values")) if not lost else ():
        others = [r for r, x in zip(ranks, every[:, column].tolist(), strict=True) if x != int(every[0, column])]
        if others:
            raise RanksDiffer(
                f"rank {', '.join(map(str, others))} calls the ensemble with other {name} than rank {ranks[0]}; "
                "seed all ranks alike, or take distribute(..., batch='local') where each has a batch of its own"
            )
    return len(set(every[:, 3].tolist())) == 1


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
