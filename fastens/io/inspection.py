"""What is in a checkpoint, and which weights of it would be taken; nothing of it is run."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from fastens.io import containers, described, folders, torch_files
from fastens.io.choice import NoFit, Wish, choose
from fastens.io.contents import Contents, components
from fastens.io.members import Factory
from fastens.io.names import EMA, STATE, UNCLEAR, UNSAID, decay_in, kind_of, unwrapped, words
from fastens.raw import raw

# Names of modules and dictionaries that hold a network, and say nothing else of it.
_HOLDERS = frozenset(
    "state_dict model model_state_dict model_state net network unet denoiser diffusion_model params weights".split()
)


@dataclasses.dataclass
class Group:
    """Tensors under one place of a file, as their names say, without the network that they may fit.

    Attributes:
        place: full name in front of theirs.
        kind: of :mod:`fastens.io.names`.
        decay: of an average, where the file says it.
        tensors: by their own names.
    """

    place: str
    kind: str
    decay: float | None
    tensors: dict[str, Tensor]

    @property
    def digest(self) -> str:
        """Equal for equal names and values, whatever file they are in."""
        total = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            if tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_quantized:
                total.update(raw(tensor).numpy().data)
        return total.hexdigest()[:16]

    def lines(self, names: bool) -> Iterator[str]:
        """A line that describes it, and one for some of its tensors or for all."""
        dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in self.tensors.values())
        count = sum(tensor.numel() for tensor in self.tensors.values())
        kind = "weights" if self.kind == UNSAID else self.kind
        decay = "" if self.decay is None else f" {self.decay:g}"
        numbers = f"{len(self.tensors)} tensors, {count:,} numbers, {', '.join(dtypes)}"
        yield f"{self.place or '(the file itself)'}: {kind}{decay}, {numbers}, hash {self.digest}"
        shown = list(self.tensors.items())
        for name, tensor in shown if names else shown[:3]:
            yield f"  {name} {list(tensor.shape)}"
        if not names and len(shown) > 3:
            yield f"  ... and {len(shown) - 3} more"


def groups(contents: Contents) -> list[Group]:
    """A file's tensors by the place that they are in."""
    found: dict[tuple[str, ...], Group] = {}
    for entry in contents.entries:
        names = list(unwrapped(entry.name.split("."))) or [entry.name]
        depth = 0
        while depth < len(names) - 1 and (names[depth] in _HOLDERS or kind_of(names[depth : depth + 1]) != UNSAID):
            depth += 1
        glued = len(names) == depth + 1 and kind_of(words(names[-1])[:1]) == EMA and entry.tensor.numel() > 1
        place = (*entry.keys, *names[:depth], *([f"{words(names[-1])[0]}_*"] if glued else []))
        group = found.get(place)
        if group is None:
            kind = contents.said.get(".".join(entry.keys)) or kind_of(place)
            group = found[place] = Group(".".join(place), kind, _decay(contents, place, kind), {})
        name = ".".join(names[depth:])
        group.tensors[name if name not in group.tensors else entry.path] = entry.tensor
    for unnamed in contents.lists:
        tensors = {f"[{i}]": tensor for i, tensor in enumerate(unnamed.tensors)}
        kind = kind_of(components(unnamed))
        found[unnamed.keys] = Group(unnamed.path, kind, _decay(contents, unnamed.keys, kind), tensors)
    return list(found.values())


def _decay(contents: Contents, place: tuple[str, ...], kind: str) -> float | None:
    if kind != EMA:
        return None
    for above in (place, place[:-1]):
        value = contents.numbers.get(".".join((*above, "decay")))
        if value is not None and 0 < value < 1:
            return value
    return decay_in(place)


def report(path: Path, wish: Wish, factory: Factory | None = None, names: bool = False) -> Iterator[str]:
    """Lines on a checkpoint: what it is, what is in it, and which weights would be taken.

    Args:
        path: a file or a folder.
        wish: as :func:`fastens.load_members` takes it.
        factory: makes the network that the weights are for; none where they are judged by their names alone.
        names: list every tensor.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is damaged, or of no known format.
    """
    if not path.exists():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    if path.is_dir():
        yield f"{path}: a folder"
        for weights in folders.weights_in(path):
            yield f"  {weights.path.name}: variant {weights.variant or 'plain'}, sha256 {_sha256(weights.path)}"
        for beside in folders.averages_beside(path):
            yield f"  {beside.name}: an average by its name{'' if beside.is_dir() else f', sha256 {_sha256(beside)}'}"
        try:
            path, wish = folders.model_folder(path, wish)
            contents = folders.read(path, wish, trusted=False)
        except ValueError as error:
            yield f"not settled: {error}"
            return
        if factory is None and (path / folders.CONFIG).is_file():
            factory = _described(path)
    else:
        yield f"{path}: {path.stat().st_size:,} bytes, sha256 {_sha256(path)}"
        if containers.is_pickle(path):
            yield f"a pickle, which is not read; it names {', '.join(torch_files.named_in(path)) or 'nothing'}"
            return
        try:
            contents = containers.read(path)
        except torch_files.NotRun as error:
            yield f"not read: {error}"
            return
    yield f"{contents.kind} of {len(contents.entries) + sum(len(u.tensors) for u in contents.lists)} tensors"
    every = groups(contents)
    there = [group for group in every if group.kind != STATE]
    for group in every if names else there:
        yield from group.lines(names)
    if len(there) < len(every) and not names:
        yield f"({sum(len(group.tensors) for group in every if group.kind == STATE)} tensors of an optimiser's state)"
    for place, what in contents.opaque.items():
        yield f"{place}: a {what}, which was not made"
    for ema in (True, False):
        chosen = dataclasses.replace(wish, ema=ema)
        yield f"ema={ema}: {_taken(contents, chosen, factory) if factory else _by_names(there, chosen)}"


def _described(folder: Path) -> Factory | None:
    try:
        return described.factory(folder)
    except (ValueError, ImportError):
        return None


def _taken(contents: Contents, wish: Wish, factory: Factory) -> str:
    network: nn.Module = factory()
    try:
        chosen = choose(contents, network, wish, f"does not fit the {type(network).__name__}")
    except NoFit as error:
        return f"nothing: {error}"
    except ValueError as error:
        return f"not settled: {error}"
    lacking = f"; without values of {', '.join(chosen.missing[:3])}" if chosen.missing else ""
    return f"takes {chosen.candidate.describe()}, which fits the {type(network).__name__}{lacking}"


def _by_names(there: list[Group], wish: Wish) -> str:
    """What the names alone say would be taken; which of them fits, the network decides."""
    weights = [group for group in there if any(tensor.numel() > 1 for tensor in group.tensors.values())]
    if wish.key is not None or wish.prefix is not None:
        begin = ".".join(part.strip(".") for part in (wish.key, wish.prefix) if part)
        weights = [group for group in weights if f".{group.place}.".find(f".{begin}.") >= 0]
    averages = [group for group in weights if group.kind in (EMA, UNCLEAR)]
    pool = averages if wish.ema and averages else [group for group in weights if group not in averages]
    if not pool:
        return "nothing: there are averages alone" if averages else "nothing: there are no weights"
    places = ", ".join(group.place or "(the file itself)" for group in pool)
    if len(pool) == 1:
        return f"takes {places}, if it fits the network"
    return f"takes the one of {places} that fits the network; where several do, key= or prefix= says which"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
