"""What a checkpoint holds, as one flat table, however its dictionaries are nested."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastens.io.names import EMA, RAW, split

_DEEPEST, _MOST = 40, 2_000_000


class Entry(NamedTuple):
    """A tensor: the keys of the dictionaries that lead to it, and its name in the last of them."""

    keys: tuple[str, ...]
    name: str
    tensor: Tensor

    @property
    def path(self) -> str:
        """The full name, as ``key=`` takes its beginning."""
        return ".".join((*self.keys, self.name))


class Unnamed(NamedTuple):
    """A list of tensors without names, as averages of ``network.parameters()`` are kept."""

    keys: tuple[str, ...]
    tensors: list[Tensor]

    @property
    def path(self) -> str:
        """The full name of the list."""
        return ".".join(self.keys)


@dataclasses.dataclass
class Contents:
    """A checkpoint's tensors and what stands beside them.

    Attributes:
        source: what it was read from, for messages.
        kind: the container: "safetensors", "torch file", ...
        entries: tensors by name.
        lists: tensors without names.
        numbers: numbers by full name (decays, steps).
        networks: whole modules by full name, from pickles that may run code.
        opaque: full names of what is neither, with its type.
        said: full names of dictionaries, and what else in the file says that they hold: EMA or RAW.
        keys: the file's first keys, for messages.
        root: the type of the file's outermost value, for messages.
        tied: names that the format dropped, and the name that each was tied to.
    """

    source: str
    kind: str
    entries: list[Entry] = dataclasses.field(default_factory=list)
    lists: list[Unnamed] = dataclasses.field(default_factory=list)
    numbers: dict[str, float] = dataclasses.field(default_factory=dict)
    networks: dict[str, nn.Module] = dataclasses.field(default_factory=dict)
    opaque: dict[str, str] = dataclasses.field(default_factory=dict)
    said: dict[str, str] = dataclasses.field(default_factory=dict)
    keys: list[str] = dataclasses.field(default_factory=list)
    root: str = "dict"
    tied: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def empty(self) -> bool:
        """Whether there are no weights in it."""
        return not (self.entries or self.lists or self.networks)

    def add(self, value: Any, keys: tuple[str, ...] = ()) -> Contents:
        """Add what a file held under ``keys``.

        Raises:
            ValueError: nested too deep, or too large to be a checkpoint.
        """
        if not keys:
            self.root = type(value).__name__
            self.keys = sorted(str(key)[:60] for key in value) if isinstance(value, dict) else []
            self.said = _said(value) if isinstance(value, dict) else {}
        self._walk(value, keys, [], [0])
        return self

    def _walk(self, value: Any, keys: tuple[str, ...], above: list[int], seen: list[int]) -> None:
        seen[0] += 1
        if len(above) > _DEEPEST or seen[0] > _MOST or id(value) in above:
            raise ValueError(f"checkpoint {self.source} is nested too deep, or in itself, at {'.'.join(keys)[:80]!r}")
        if hasattr(value, "described"):  # a record that was not made, see fastens.io.torch_files
            self.opaque[".".join(keys)] = value.described
        elif isinstance(value, nn.Module):
            self.networks[".".join(keys)] = value
        elif isinstance(value, Tensor):
            container, name = keys[:-1], (keys or ("",))[-1]
            self.entries.append(Entry(container, name, value.detach()))
            if value.numel() == 1 and not value.is_meta and not value.is_complex():
                self.numbers[".".join(keys)] = float(value)
        elif isinstance(value, dict):
            for key, inner in list(value.items()):
                named = str(key) if isinstance(key, str | int | float) else type(key).__name__
                self._walk(inner, (*keys, named), [*above, id(value)], seen)
        elif isinstance(value, list | tuple):
            if value and all(isinstance(inner, Tensor) for inner in value) and keys:
                self.lists.append(Unnamed(keys, [inner.detach() for inner in value]))
                return
            for i, inner in enumerate(value):
                if keys or not isinstance(inner, Tensor):
                    self._walk(inner, (*keys, f"[{i}]"), [*above, id(value)], seen)
        elif isinstance(value, bool | int | float):
            if abs(value) < 1e300:
                self.numbers[".".join(keys)] = float(value)
        elif value is not None and not isinstance(value, str | bytes | torch.dtype | torch.device | torch.Size):
            self.opaque[".".join(keys)] = type(value).__name__


def _said(root: dict[Any, Any]) -> dict[str, str]:
    """What the libraries that put an average where the weights were let their files say."""
    if {"current_model_state", "averaging_state", "state_dict"} <= root.keys():  # Lightning's WeightAveraging
        return {"state_dict": EMA}
    meta = root.get("meta")
    if isinstance(meta, dict) and "mmengine_version" in meta and {"state_dict", "ema_state_dict"} <= root.keys():
        return {"state_dict": EMA, "ema_state_dict": RAW}  # mmengine's EMAHook exchanges them
    return {}


def components(entry: Entry | Unnamed) -> tuple[str, ...]:
    """All names that lead to a tensor, and its own, one by one."""
    name = entry.name.split(".") if isinstance(entry, Entry) else []
    return (*(part for key in entry.keys for part in split(key)), *name)
