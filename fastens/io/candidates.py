"""Complete sets of weights in a checkpoint: wherever a network's names occur with the network's shapes."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from fastens.io.contents import Contents, Entry, components
from fastens.io.names import (
    BOOKKEEPING,
    EMA,
    STATE,
    UNCLEAR,
    UNSAID,
    decay_in,
    is_average_in_state,
    kind_of,
    split,
    unwrapped,
)

_SEPARATORS = ("", "_", "-", "/", "__")  # instead of dots: buffers' names have none (latent-diffusion's LitEma)


@dataclasses.dataclass
class Candidate:
    """One set of weights in a checkpoint.

    Attributes:
        path: full name of what it is, as ``key=`` takes it.
        prefix: the names in front of the network's own, without wrappers'.
        inner: those of them that are inside a flat dictionary, as ``prefix=`` takes them.
        kind: RAW, EMA, UNCLEAR, UNSAID or STATE of :mod:`fastens.io.names`.
        tensors: by the network's names.
        missing: the network's names that it has not.
        decay: of the average, where the file says it.
        problem: why these weights are not the network's; empty where they are.
        module: the network itself, where a pickle held one.
        named: whether its tensors have names; a list without them is no network's weights unless it is said to be.
        covers: full names of the tensors that it is made of.
        larger: whether it is whole, and its problem that its dictionary holds more than the network.
        also: prefixes of further dictionaries that parts of it are in.
    """

    path: str
    prefix: tuple[str, ...]
    inner: tuple[str, ...]
    kind: str
    tensors: dict[str, Tensor]
    missing: list[str]
    decay: float | None = None
    problem: str = ""
    module: nn.Module | None = None
    covers: frozenset[str] = frozenset()
    named: bool = True
    larger: bool = False
    also: tuple[tuple[str, ...], ...] = ()

    def describe(self) -> str:
        """One line: where, what, how much."""
        decay = "" if self.decay is None else f" {self.decay:g}"
        where = " with ".join((self.path or "the file itself", *map(".".join, self.also)))
        return f"{where} ({self.kind if self.kind != 'unsaid' else 'weights'}{decay}, {len(self.tensors)} tensors)"


class Wanted:
    """What a network needs: its tensors by canonical name.

    Raises:
        ValueError: it has no tensors.
    """

    def __init__(self, network: nn.Module) -> None:
        self.state = {k: v for k, v in network.state_dict(keep_vars=True).items() if isinstance(v, Tensor)}
        if not self.state:
            raise ValueError("the network has no weights to load; expected parameters or buffers")
        self.parameters = [(name, p) for name, p in network.named_parameters()]
        # A factory that freezes all of the network for inference says nothing of what was trained.
        trainable = {id(p) for _, p in self.parameters if p.requires_grad} or {id(p) for _, p in self.parameters}
        self.trainable = {name for name, tensor in self.state.items() if id(tensor) in trainable}
        canonical = {name: unwrapped(name.split(".")) for name in self.state}
        self.wrapped = len(set(canonical.values())) == len(canonical) and all(canonical.values())
        if not self.wrapped:  # the network itself tells "module.x" from "x"
            canonical = {name: tuple(name.split(".")) for name in self.state}
        self.by_components = {parts: name for name, parts in canonical.items()}
        self.depths = sorted({len(parts) for parts in self.by_components})
        groups: dict[tuple, list[str]] = defaultdict(list)
        for name, tensor in self.state.items():
            groups[identity(tensor)].append(name)
        self.ties = {name: [n for n in names if n != name] for names in groups.values() for name in names}

    def canonical(self, parts: Iterable[str]) -> tuple[str, ...]:
        """Names without wrappers', unless the network's own would become the same."""
        return unwrapped(tuple(parts)) if self.wrapped else tuple(parts)

    def complete(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Tensors with those that the format dropped because they are tied, and the names that are still missing."""
        full = dict(tensors)
        for name in self.state:
            if name not in full:
                tied = next((other for other in self.ties[name] if other in tensors), None)
                if tied is not None:
                    full[name] = tensors[tied]
        # Files older than torch 0.4 have no counter of batches, and torch starts it at zero as it did.
        missing = [n for n in self.state if n not in full and not n.endswith("num_batches_tracked")]
        return full, missing

    def mismatch(self, tensors: Mapping[str, Tensor]) -> str:
        """Why tensors are not this network's; empty where they are."""
        for name, tensor in tensors.items():
            like = self.state[name]
            if tensor.shape != like.shape:
                return f"{name} is {list(tensor.shape)} in the file and {list(like.shape)} in the network"
            if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
                return f"{name} is stored as {tensor.layout}, quantised, or without its values"
            if like.is_floating_point() and not tensor.is_floating_point():
                return f"{name} is {tensor.dtype} in the file and {like.dtype} in the network (quantised weights?)"
            if like.is_complex() != tensor.is_complex():
                return f"{name} is {tensor.dtype} in the file and {like.dtype} in the network"
            counted = name.endswith("num_batches_tracked")  # which averages may hold a mean of
            if not (counted or like.is_floating_point() or like.is_complex() or _holds(like.dtype, tensor)):
                return f"{name} is {tensor.dtype} in the file, of values that {like.dtype} in the network does not hold"
            for other in self.ties[name]:
                if other in tensors and not same(tensor, tensors[other]):
                    return f"{name} and {other} are one tensor in the network, and two different ones in the file"
        return ""


def _holds(dtype: torch.dtype, tensor: Tensor) -> bool:
    """Whether a dtype of integers or booleans has all values of a tensor."""
    return dtype == tensor.dtype or bool((tensor.to(dtype).to(tensor.dtype) == tensor).all())


def identity(tensor: Tensor) -> tuple:
    """Equal for tensors that are one tensor under two names."""
    if tensor.is_meta or tensor.numel() == 0:
        return (id(tensor),)
    return tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal to the bit, NaN included."""
    if a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()):
        return True
    return a.dtype == b.dtype and a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def candidates(contents: Contents, wanted: Wanted) -> list[Candidate]:
    """All candidates, those with a ``problem`` or with names ``missing`` too."""
    found = [*_named(contents, wanted), *_joined(contents, wanted), *_lists(contents, wanted)]
    for path, module in contents.networks.items():
        state = {k: v for k, v in module.state_dict().items() if isinstance(v, Tensor)}
        inner = Contents(contents.source, "module").add(state)
        for candidate in _named(inner, wanted):
            prefix = (*path.split("."), *candidate.prefix)
            found.append(dataclasses.replace(candidate, path=path, prefix=prefix, kind=kind_of(prefix), module=module))
    for candidate in found:
        said = next((k for at, k in contents.said.items() if f"{candidate.path}.".startswith(f"{at}.")), None)
        if said is not None or (candidate.kind == UNSAID and _is_averaged_model(contents, candidate)):
            candidate.kind = said or EMA
        elif is_average_in_state(candidate.prefix) and not wanted.trainable.intersection(candidate.missing):
            candidate.kind = UNCLEAR  # of the weights, not of gradients or moments
        candidate.problem = candidate.problem or wanted.mismatch(candidate.tensors)
        candidate.decay = _decay(contents, candidate)
    found = _united(found, wanted)
    _find_extras(contents, wanted, found)
    return found


def _is_averaged_model(contents: Contents, candidate: Candidate) -> bool:
    """Whether a set is the network in torch's ``AveragedModel``, or latent-diffusion's, by the counts beside it."""
    for name in contents.numbers:
        place, _, last = name.rpartition(".")
        inside = f"{place}." if place else ""
        if last == "n_averaged" and all(path.startswith(f"{inside}module.") for path in candidate.covers):
            return True
        if last == "num_updates" and f"{inside}decay" in contents.numbers and candidate.path == place:
            return True
    return False


def _united(found: list[Candidate], wanted: Wanted) -> list[Candidate]:
    """The same, with one set where its parameters and its buffers stand in dictionaries side by side."""
    groups: dict[tuple, list[Candidate]] = defaultdict(list)
    for candidate in found:
        if candidate.missing and candidate.named and candidate.prefix and not candidate.problem:
            groups[candidate.prefix[:-1], candidate.kind].append(candidate)
    for parts in groups.values():
        names = Counter(name for part in parts for name in part.tensors)
        if len(parts) < 2 or max(names.values()) > 1:
            continue
        first, *others = sorted(parts, key=lambda part: len(wanted.trainable.intersection(part.missing)))
        if wanted.trainable.intersection(first.missing):  # layers of another network, of which each has a part
            continue
        tensors, missing = wanted.complete({name: t for part in parts for name, t in part.tensors.items()})
        if len(missing) < len(first.missing):
            covers = frozenset().union(*(part.covers for part in parts))
            also = tuple(part.prefix for part in others)
            whole = dataclasses.replace(first, tensors=tensors, missing=missing, covers=covers, also=also)
            found = [candidate for candidate in found if not any(candidate is part for part in parts)] + [whole]
    return found


def _named(contents: Contents, wanted: Wanted) -> Iterator[Candidate]:
    """Sets under the network's own names, behind any prefix."""
    tables: dict[tuple[str, ...], dict[str, list[Entry]]] = defaultdict(lambda: defaultdict(list))
    for entry in contents.entries:
        parts = wanted.canonical(components(entry))
        for depth in wanted.depths:
            name = wanted.by_components.get(parts[-depth:]) if depth <= len(parts) else None
            if name is not None:
                tables[parts[:-depth]][name].append(entry)
    for prefix, table in tables.items():
        for entries in _unmixed(table):
            tensors, missing = wanted.complete({name: entry.tensor for name, entry in entries.items()})
            path, inner = _place(prefix, _common(entry.keys for entry in entries.values()), wanted)
            paths = frozenset(entry.path for entry in entries.values())
            yield Candidate(path, prefix, inner, kind_of(prefix), tensors, missing, covers=paths)


def _place(prefix: tuple[str, ...], keys: tuple[str, ...], wanted: Wanted) -> tuple[str, tuple[str, ...]]:
    """Return a set's full name in its file, and the part of its prefix that is inside a flat dictionary."""
    outer = wanted.canonical(part for key in keys for part in split(key))
    if len(outer) > len(prefix):  # the network's own names are nested too
        return ".".join(prefix), ()
    inner = prefix[len(outer) :]
    return ".".join((*keys, *inner)), inner


def _unmixed(table: Mapping[str, list[Entry]]) -> Iterator[dict[str, Entry]]:
    """One set, or, where wrapped and bare names stand side by side, one for each way of wrapping."""
    if all(len(entries) == 1 for entries in table.values()):
        yield {name: entries[0] for name, entries in table.items()}
        return
    by_wrapping: dict[tuple, dict[str, Entry]] = defaultdict(dict)
    for name, entries in table.items():
        for entry in entries:
            parts = components(entry)
            wrappers = tuple(part for part in parts if part not in unwrapped(parts))
            by_wrapping[entry.keys, wrappers][name] = entry
    yield from by_wrapping.values()


def _common(paths: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    first, *others = set(paths)
    length = len(first)
    for other in others:
        length = min(length, next((i for i, (a, b) in enumerate(zip(first, other, strict=False)) if a != b), length))
        length = min(length, len(other))
    return first[:length]


def _joined(contents: Contents, wanted: Wanted) -> Iterator[Candidate]:
    """Sets whose names are the network's with their dots taken out, as a buffer's name must be."""
    folders: dict[tuple[str, ...], dict[str, Entry]] = defaultdict(dict)
    for entry in contents.entries:
        parts = wanted.canonical(components(entry))
        folders[parts[:-1]][parts[-1]] = entry
    names = {name: parts for parts, name in wanted.by_components.items()}
    if not any(len(parts) > 1 for parts in names.values()):
        return
    longest = max(wanted.trainable or names, key=lambda name: len(names[name]))
    for separator in _SEPARATORS:
        joined = {name: separator.join(parts) for name, parts in names.items()}
        unique = Counter(joined.values())
        probe = joined[longest]
        for folder, leaves in folders.items():
            for glue in {leaf.removesuffix(probe) for leaf in leaves if leaf.endswith(probe)}:
                entries = {name: leaves[glue + leaf] for name, leaf in joined.items() if glue + leaf in leaves}
                if len(entries) < max(1, len(wanted.trainable) // 2) or (separator == "" and len(names[longest]) < 2):
                    continue
                twice = [name for name in entries if unique[joined[name]] > 1]
                tensors, missing = wanted.complete({name: entry.tensor for name, entry in entries.items()})
                prefix = (*folder, glue) if glue else folder
                problem = f"its names do not tell {' from '.join(sorted(twice)[:2])}" if twice else ""
                paths = frozenset(entry.path for entry in entries.values())
                path, inner = _place(folder, _common(entry.keys for entry in entries.values()), wanted)
                kind = kind_of(prefix)
                yield Candidate(path, prefix, inner, kind, tensors, missing, problem=problem, covers=paths)


def _lists(contents: Contents, wanted: Wanted) -> Iterator[Candidate]:
    """Averages without names, in the order of the network's parameters: all of them, or the trainable ones."""
    every = wanted.parameters
    for unnamed in contents.lists:
        prefix = components(unnamed)
        trainable = [(name, p) for name, p in every if p.requires_grad]
        chosen = next((some for some in (every, trainable) if len(some) == len(unnamed.tensors)), None)
        problem, tensors = "", {}
        if chosen is None:
            problem = (
                f"it has {len(unnamed.tensors)} averaged parameters without names, and the network has {len(every)} "
                f"parameters, {len(trainable)} of them trainable: freeze in factory what was frozen in training"
            )
        else:
            tensors = {name: tensor for (name, _), tensor in zip(chosen, unnamed.tensors, strict=True)}
        known, missing = wanted.complete({n: t for n, t in tensors.items() if n in wanted.state})
        covers = frozenset((unnamed.path,))
        kind = kind_of(prefix)
        yield Candidate(unnamed.path, prefix, (), kind, known, missing, problem=problem, covers=covers, named=False)


def _decay(contents: Contents, candidate: Candidate) -> float | None:
    said = decay_in(candidate.prefix)
    if candidate.kind != EMA or said is not None:
        return said
    path = candidate.path
    for where in (path, path.rpartition(".")[0], path.rpartition(".")[0].rpartition(".")[0]):
        for name in ("decay", "ema_decay", "beta"):
            value = contents.numbers.get(f"{where}.{name}" if where else name)
            if value is not None and 0 < value < 1:
                return value
    return None


def _find_extras(contents: Contents, wanted: Wanted, found: list[Candidate]) -> None:
    """Note in ``problem`` where a set has tensors that the network has not: they are of another network."""
    whole = [c for c in found if not c.problem and (not c.missing or c.kind == EMA)]
    owners: dict[str, list[Candidate]] = defaultdict(list)
    for candidate in whole:
        for path in candidate.covers:
            owners[path].append(candidate)
    parts = [(entry, wanted.canonical(components(entry))) for entry in contents.entries]
    for candidate in found:
        if candidate.problem or candidate.missing or candidate.module is not None:
            continue
        keys = {entry.keys for entry, _ in parts if entry.path in candidate.covers}
        extra = [
            ".".join(names[depth:])
            for prefix in (candidate.prefix, *candidate.also)
            for depth in (len(prefix),)
            for entry, names in parts
            if entry.keys in keys
            and names[:depth] == prefix
            and entry.path not in candidate.covers
            and names[depth:] not in wanted.by_components  # of another set, wrapped otherwise
            and not any(len(other.prefix) > depth for other in owners[entry.path])
            and not (entry.tensor.numel() == 1 and names[-1] in BOOKKEEPING)
            and kind_of(names[depth:-1]) not in (EMA, UNCLEAR, STATE)
        ]
        if extra:
            candidate.larger = True
            candidate.problem = f"the network has no {', '.join(sorted(extra)[:3])}{', ...' if len(extra) > 3 else ''}"
