"""The choice of one set of weights: by ``ema``, ``key`` and ``prefix``; two that fit are an error that lists them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from fastens.io.candidates import Candidate, Wanted, candidates, same
from fastens.io.contents import Contents, Entry, Unnamed, components
from fastens.io.names import EMA, RAW, STATE, UNCLEAR, UNSAID, kind_of, unwrapped

_HINT = "; it looks like an optimiser's state, take the model's file"
_SETTLE = "say which by key= (a dictionary in the file) or prefix= (the beginning of the names)"


# Records of settings, in which there are no weights, whatever they are called.
_SETTINGS = (
    "omegaconf.",
    "pathlib.",
    "datetime.",
    "typing.",
    "functools.",
    "numpy.dtype",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "pytorch_lightning.",
    "lightning.",
)
_ADAPTER = re.compile(r"(^|[._])(lora|loha|lokr|dora)([._]|$)", re.IGNORECASE)


class NoFit(ValueError):
    """No set of weights in a file is one of the network's."""


@dataclasses.dataclass(frozen=True)
class Wish:
    """Which weights of a file a caller wants.

    Attributes:
        ema: the averaged ones, where the file has both.
        key: full name of the dictionary in the file that holds them, or its beginning; none for any.
        prefix: the names in front of the network's own in that dictionary; none for any.
        variant: of the weights in a folder (``fp16``, ``ema``, ...); none for any.
    """

    ema: bool = True
    key: str | None = None
    prefix: str | None = None
    variant: str | None = None

    @property
    def explicit(self) -> bool:
        """Whether the caller named the place, so that its name need not say what it is."""
        return self.key is not None or self.prefix is not None


@dataclasses.dataclass(frozen=True)
class Chosen:
    """The weights that were chosen.

    Attributes:
        candidate: what they are.
        tensors: by the network's names, all that the file has for it.
        missing: names for which the file has nothing, because an average was kept of parameters alone.
    """

    candidate: Candidate
    tensors: dict[str, Tensor]
    missing: list[str]


def choose(contents: Contents, network: nn.Module, wish: Wish, described: str) -> Chosen:
    """The weights in a file that are meant.

    Args:
        contents: of the file.
        network: whose names and shapes decide what is a complete set.
        wish: of the caller.
        described: what the weights do not fit, for messages ("does not fit ...").

    Raises:
        ValueError: none fits, several do, or a name that looks like an average is not understood.
    """
    check_not_empty(contents)
    wanted = Wanted(network)
    everything = candidates(contents, wanted)
    found = [c for c in everything if _is_at(c, wish, wanted)] if wish.explicit else everything
    for candidate in found:
        entry_of_list = candidate.inner and candidate.inner[-1].isdigit() and not wish.explicit
        if entry_of_list and not candidate.problem and not candidate.missing:
            candidate.problem = "it is one entry of a list of modules, so it may be a part of a larger network"
    fitting = _distinct([c for c in found if _fits(c, wanted)])
    averages = [c for c in fitting if c.kind == EMA]
    unclear = [c for c in fitting if c.kind == UNCLEAR]
    plain = [c for c in fitting if c.kind in (RAW, UNSAID) and c.named]
    if wish.ema:
        candidate = _average(contents, wish, averages, unclear, plain, found)
    elif not plain and (averages or unclear) and not wish.explicit:
        raise ValueError(
            f"checkpoint {contents.source} holds averaged weights alone, {listed(averages + unclear)}; pass ema=True, "
            "or a file of the weights themselves"
        )
    else:
        candidate = _one(contents, plain)
    if candidate is None and wish.explicit:
        candidate = _one(contents, fitting)
    if candidate is None:
        raise NoFit(_no_fit(contents, wanted, found, everything, wish, described))
    if not wish.explicit:
        _check_no_adapters(contents, wanted)
        _one(contents, [candidate, *(c for c in found if _rivals(candidate, c, wanted))])
    return _with_rest(contents, candidate, everything, wanted)


def _check_no_adapters(contents: Contents, wanted: Wanted) -> None:
    """Raise ValueError where an adapter (LoRA) stands beside the weights, which are not the whole without it."""
    found = [entry.path for entry in contents.entries if _ADAPTER.search(entry.path)]
    if found and not any(_ADAPTER.search(name) for name in wanted.state):
        raise ValueError(
            f"checkpoint {contents.source} holds an adapter beside the weights, {found[:2]}, which the network has no "
            "place for: merge it into them (merge_and_unload of PEFT, fuse_lora of diffusers), or say key= of the "
            "weights that are meant without it"
        )


def check_not_empty(contents: Contents) -> None:
    """Raise ValueError where a file holds no weights at all, and say what it holds."""
    if not contents.empty:
        return
    hint = _HINT if "param_groups" in contents.keys else ""
    records = f"; it has records that were not made: {sorted(contents.opaque.items())[:3]}" if contents.opaque else ""
    what = (
        f"holds a {contents.root}, which is no dictionary of tensors"
        if contents.root != "dict"
        else (f"holds no dictionary of tensors; its keys are {contents.keys[:8]}")
    )
    pickled = " (a pickle)" if contents.kind == "torch file" else ""
    raise ValueError(f"checkpoint {contents.source}{pickled} {what}{records}{hint}")


def listed(found: Sequence[Candidate]) -> str:
    """Candidates for a message."""
    return "; ".join(f"{c.describe()}{f', but {c.problem}' if c.problem else ''}" for c in found)


def _average(
    contents: Contents,
    wish: Wish,
    averages: list[Candidate],
    unclear: list[Candidate],
    plain: list[Candidate],
    found: list[Candidate],
) -> Candidate | None:
    if (averages and not unclear) or wish.explicit:
        return _one(contents, [*averages, *unclear] or plain)
    if averages or unclear:
        raise ValueError(
            f"checkpoint {contents.source} has names that look like averages, and it is not clear which is meant: "
            f"{listed(averages + unclear)}; {_SETTLE}"
        )
    left = _not_understood(contents, plain, found)
    if left:
        shown = f"{'; '.join(left[:4])}{'; ...' if len(left) > 4 else ''}"
        raise ValueError(
            f"checkpoint {contents.source} has names that look like averages of weights, but do not fit the network: "
            f"{shown}; {_SETTLE}, or pass ema=False for the weights themselves{_beside(plain)}"
        )
    return _one(contents, plain)


def _beside(plain: list[Candidate]) -> str:
    return f": {listed(plain)}" if plain else ""


def _one(contents: Contents, fitting: list[Candidate]) -> Candidate | None:
    if len(fitting) > 1:
        raise ValueError(
            f"checkpoint {contents.source} has {len(fitting)} sets of weights that fit the network: {listed(fitting)}; "
            f"{_SETTLE}"
        )
    return fitting[0] if fitting else None


def _fits(candidate: Candidate, wanted: Wanted) -> bool:
    if candidate.problem:
        return False
    if candidate.kind in (EMA, UNCLEAR):  # averages are kept of what is trained, and the rest is beside them
        return not wanted.trainable.intersection(candidate.missing)
    return not candidate.missing


def _rivals(candidate: Candidate, other: Candidate, wanted: Wanted) -> bool:
    """Whether another set of its kind may be meant as well, though it does not fit.

    It may hold all that is trained and lack the rest, or the names, as averages do that are not called so, or stand in
    a dictionary that holds more than the network.
    """
    trained = not (other.problem or other.kind == EMA or wanted.trainable.intersection(other.missing))
    if not (other.larger or (trained and (other.missing or not other.named))):
        return False
    alike = (candidate.kind == EMA) == (other.kind == EMA) and other.kind not in (UNCLEAR, STATE)
    return alike and not all(same(tensor, candidate.tensors[name]) for name, tensor in other.tensors.items())


def _distinct(found: list[Candidate]) -> list[Candidate]:
    """Candidates without those that hold what an earlier one of their kind holds."""
    kept: list[Candidate] = []
    for candidate in found:
        if not any(_equal(candidate, other) for other in kept):
            kept.append(candidate)
    return kept


def _equal(a: Candidate, b: Candidate) -> bool:
    alike = (a.kind == EMA) == (b.kind == EMA) and a.tensors.keys() == b.tensors.keys()
    return alike and all(same(tensor, b.tensors[name]) for name, tensor in a.tensors.items())


def _is_at(candidate: Candidate, wish: Wish, wanted: Wanted) -> bool:
    if wish.key is not None:
        key = unwrapped(wish.key.split("."))
        whole = unwrapped(candidate.path.split("."))
        if whole[: len(key)] != key:
            return False
    if wish.prefix is not None:
        prefix = wanted.canonical(part for part in wish.prefix.split(".") if part)
        return prefix in (candidate.inner, candidate.prefix)
    return True


def _not_understood(contents: Contents, fitting: list[Candidate], found: list[Candidate]) -> list[str]:
    """What looks like an average, by its name, and belongs to no set that fits."""
    known = {path for candidate in fitting for path in candidate.covers}
    why = {path: candidate.problem for candidate in found for path in candidate.covers if candidate.problem}
    groups: dict[str, list[str]] = {}
    for item in (*contents.entries, *contents.lists):
        tensors = [item.tensor] if isinstance(item, Entry) else item.tensors
        if item.path in known or all(tensor.numel() == 1 for tensor in tensors):  # decays, losses
            continue
        names = components(item)
        deep = isinstance(item, Entry) and len(names) > 1
        place = _first_average(names[:-1] if deep else names)
        if place and kind_of(names[:-1]) != STATE:
            groups.setdefault(place, []).append(item.path)
    for path, described in contents.opaque.items():
        if _first_average(path.split(".")) and not described.startswith(_SETTINGS):
            groups.setdefault(path, []).append(path)
            why[path] = f"a {described}, which was not made"
    lines = []
    for place, paths in groups.items():
        reason = next((why[path] for path in paths if path in why), "")
        lines.append(f"{place} ({len(paths)} tensors{f': {reason}' if reason else ''})")
    return lines


def _first_average(names: Sequence[str]) -> str:
    for i, name in enumerate(names):
        if kind_of((name,)) in (EMA, UNCLEAR):
            return "" if kind_of(names[: i + 1]) == RAW else ".".join(names[: i + 1])
    return ""


def _with_rest(contents: Contents, candidate: Candidate, everything: list[Candidate], wanted: Wanted) -> Chosen:
    """Add to an average of parameters the buffers and frozen parameters from the weights beside it."""
    if not candidate.missing:
        return Chosen(candidate, candidate.tensors, [])
    _check_nothing_else(contents, candidate, everything)
    beside = [c for c in everything if c.kind in (RAW, UNSAID) and c.named and not c.problem and not c.missing]
    lacking = [name for name in wanted.state if name not in candidate.tensors]
    rests = _distinct(
        [dataclasses.replace(c, tensors={n: c.tensors[n] for n in lacking if n in c.tensors}) for c in beside]
    )
    if len(rests) > 1:
        raise ValueError(
            f"checkpoint {contents.source}: {candidate.describe()} lacks {candidate.missing[:3]}, and {listed(rests)} "
            "have different ones; save one of them with it"
        )
    if rests:
        return Chosen(candidate, {**rests[0].tensors, **candidate.tensors}, [])
    return Chosen(candidate, candidate.tensors, candidate.missing)


def _check_nothing_else(contents: Contents, candidate: Candidate, everything: list[Candidate]) -> None:
    """Raise ValueError where an average lacks what may be among other averages: buffers in a list of their own, say."""
    others = [
        c
        for c in everything
        if c is not candidate and c.kind in (EMA, UNCLEAR) and not candidate.tensors.keys() >= c.tensors.keys()
    ]
    place = _first_average(candidate.prefix)
    understood = [c for c in everything if not c.problem]
    left = [line for line in _not_understood(contents, understood, []) if place and line.startswith(place)]
    if others or left:
        raise ValueError(
            f"checkpoint {contents.source}: {candidate.describe()} lacks {candidate.missing[:3]}, which may be in "
            f"{'; '.join(filter(None, (listed(others), *left)))}; put all of the average under one key, or pass "
            "ema=False for the weights themselves"
        )


def _no_fit(
    contents: Contents,
    wanted: Wanted,
    found: list[Candidate],
    everything: list[Candidate],
    wish: Wish,
    described: str,
) -> str:
    if wish.explicit and not found:
        named = " and ".join(
            f"{name}={value!r}" for name, value in (("key", wish.key), ("prefix", wish.prefix)) if value is not None
        )
        whole = [c for c in everything if _fits(c, wanted)]
        there = listed(whole) if whole else f"names such as {[item.path for item in _items(contents)[:4]]}"
        return f"checkpoint {contents.source} has no weights of the network at {named}; it has {there}"
    lead = f"checkpoint {contents.source} {described}{_HINT if 'param_groups' in contents.keys else ''}"
    if not found:
        return f"{lead}: none of its names is one of the network's, expected {list(wanted.state)[:3]}, it has " + str(
            [item.path for item in _items(contents)[:4]]
        )
    nearest = sorted(found, key=lambda c: (len(c.missing), bool(c.problem)))[:3]
    return f"{lead}: " + "; ".join(f"{c.describe()}: {_reason(c)}" for c in nearest)


def _reason(candidate: Candidate) -> str:
    missing = f"missing {candidate.missing[:3]}" if candidate.missing else ""
    return ", ".join(part for part in (candidate.problem, missing) if part) or "not of the kind that ema asks for"


def _items(contents: Contents) -> list[Entry | Unnamed]:
    return [*contents.entries, *contents.lists]


def load_into(network: nn.Module, chosen: Chosen, source: str, again: Callable[[], nn.Module]) -> nn.Module:
    """Copy chosen weights into a network.

    Args:
        network: whose tensors they are.
        chosen: of :func:`choose`.
        source: of the file, for messages.
        again: makes the same network; what the file lacks must be the same in both, and so no trained or drawn value.

    Raises:
        ValueError: the file lacks values that the network cannot know.
    """
    if chosen.missing:
        _check_constants(network, chosen, source, again)
    meta = any(tensor.is_meta for tensor in network.state_dict().values() if isinstance(tensor, Tensor))
    try:
        result = network.load_state_dict(chosen.tensors, strict=False, assign=meta)
    except Exception as error:  # a network's own loading code may raise anything
        raise ValueError(f"checkpoint {source} does not fit the network: {error}") from error
    if result.unexpected_keys:
        raise ValueError(f"checkpoint {source} does not fit the network: it takes no {result.unexpected_keys[:3]}")
    return network


def _check_constants(network: nn.Module, chosen: Chosen, source: str, again: Callable[[], nn.Module]) -> None:
    ours, theirs = network.state_dict(), again().state_dict()
    unknown = [
        name
        for name in chosen.missing
        if name.endswith(("running_mean", "running_var")) or name not in theirs or not same(ours[name], theirs[name])
    ]
    if unknown:
        raise ValueError(
            f"checkpoint {source} holds averages of parameters alone, {chosen.candidate.describe()}, and no values of "
            f"{unknown[:3]}, which the network does not make the same each time: pass a factory that loads the weights "
            "beside the averages first"
        )
