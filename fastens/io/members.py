"""A member from a checkpoint: the network, the weights that are meant, and both together, ready to infer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastens.io import containers, described, folders
from fastens.io.choice import NoFit, Wish, check_not_empty, choose, load_into
from fastens.io.contents import Contents, Entry
from fastens.io.names import EMA, UNCLEAR, kind_of, unwrapped
from fastens.modes import evaluating

Factory = Callable[[], nn.Module]
_NETWORKS = ("net", "model", "G", "network", "unet", "denoiser")  # names in snapshots


def load_member(path: Path, factory: Factory | None, wish: Wish, trusted: bool) -> nn.Module:
    """Read one member, in evaluation mode.

    Args:
        path: a file or a folder.
        factory: makes the network; none where the checkpoint describes or holds it.
        wish: which weights of it.
        trusted: run the code that pickles name.

    Raises:
        OSError: the checkpoint cannot be opened.
        ImportError: diffusers is needed and not installed.
        ValueError: it is damaged, does not fit, needs a factory, or leaves open which weights are meant.
    """
    folder = path.is_dir()
    if folder:
        path, wish = folders.model_folder(path, wish)
    elif wish.variant is not None:
        raise ValueError(f"variant={wish.variant!r} chooses among the files of a folder, and {path} is a file")
    config = _config(path) if folder and factory is None else {}
    contents = folders.read(path, wish, trusted) if folder else containers.read(path, trusted)
    make = factory or (_diffusers_factory(path, config, contents) if folder else None)
    if make is None:
        return evaluating(_held(contents, wish))
    network = _made(make)
    if factory is None:
        name = type(network).__name__
        fits = f"does not fit the {name} that its {folders.CONFIG} describes, is it of another architecture?"
        contents = _adapted(network, contents)
    else:
        fits = "does not fit the network that factory makes"
    contents = _with_ties(contents)
    try:
        loaded = load_into(network, choose(contents, network, wish, fits), contents.source, lambda: _made(make))
    except NoFit:
        loaded = _by_its_own_code(network, contents, wish)
        if loaded is None:
            raise
    return evaluating(loaded)


def _made(make: Factory) -> nn.Module:
    network = make()
    if not isinstance(network, nn.Module):
        raise TypeError(f"factory returned a {type(network).__name__}, expected a torch.nn.Module")
    return network


def _config(folder: Path) -> dict[str, Any]:
    file = folder / folders.CONFIG
    if not file.is_file():
        inner = [path.name for path in sorted(folder.iterdir()) if path.is_dir()]
        advice = f"; it has the folders {', '.join(inner[:4])}: if they are the members, pass them" if inner else ""
        raise ValueError(
            f"checkpoint {folder} has no {folders.CONFIG}, so it is no diffusers folder{advice}; pass factory=, which "
            "makes the network"
        )
    config = containers.read_json(file)
    described.diffusers_class(file, config.get("_class_name"))
    return config


def _diffusers_factory(folder: Path, config: dict[str, Any], contents: Contents) -> Factory:
    numbers = sum(entry.tensor.numel() for entry in contents.entries)
    return lambda: described.make(folder / folders.CONFIG, config.get("_class_name"), config, numbers)


def _held(contents: Contents, wish: Wish) -> nn.Module:
    """The network that a pickle holds: the average or the other one."""
    networks = contents.networks
    averages = {path for path in networks if kind_of(path.split(".")) in (EMA, UNCLEAR)}
    if wish.key is not None:
        networks = {path: network for path, network in networks.items() if path == wish.key}
    if not networks:
        check_not_empty(contents)
        raise ValueError(
            f"checkpoint {contents.source} holds no network{f' at key={wish.key!r}' if wish.key else ''}, neither "
            "itself nor under 'ema' or 'net'; pass factory=, a function that makes it"
        )
    if wish.key is not None or (len(networks) == 1 and (wish.ema or not averages)):
        return next(iter(networks.values()))
    plain = [path for path in networks if path.rpartition(".")[2] in _NETWORKS]  # no pipelines of augmentation
    chosen = sorted(averages) if wish.ema and averages else plain
    if len(chosen) != 1:
        raise ValueError(f"checkpoint {contents.source} holds the networks {sorted(networks)}; say which by key=")
    return networks[chosen[0]]


def _adapted(network: nn.Module, contents: Contents) -> Contents:
    if any(entry.keys for entry in contents.entries) or contents.lists:
        return contents
    tensors = described.adapted(network, {entry.name: entry.tensor for entry in contents.entries})
    contents.entries = [Entry((), name, tensor) for name, tensor in tensors.items()]
    return contents


def _with_ties(contents: Contents) -> Contents:
    """Tensors that the format dropped because they were tied to others, under their names again."""
    there = {entry.name: entry for entry in contents.entries if not entry.keys}
    contents.entries += [Entry((), name, there[kept].tensor) for name, kept in contents.tied.items() if kept in there]
    return contents


def _by_its_own_code(network: nn.Module, contents: Contents, wish: Wish) -> nn.Module | None:
    """Load weights whose names only the network's own loading code knows; None where that does not apply.

    ``load_state_dict`` of such a network renames as it reads (weight norm, attention of older versions). Only a
    dictionary that it takes whole, and whose name does not contradict the wish, is taken.
    """
    if wish.prefix is not None or not any(m._load_state_dict_pre_hooks or _reads_itself(m) for m in network.modules()):
        return None
    tables: dict[tuple[str, ...], dict[str, Tensor]] = {}
    for entry in contents.entries:
        tables.setdefault(entry.keys, {})[".".join(unwrapped(entry.name.split(".")))] = entry.tensor
    taken: list[tuple[str, nn.Module]] = []
    for keys, table in tables.items():
        at = ".".join(keys)
        excluded = kind_of(keys) in (EMA, UNCLEAR) if wish.key is None and not wish.ema else wish.key not in (None, at)
        if excluded or len(table) * 2 < len(network.state_dict()):
            continue
        attempt = copy.deepcopy(network)
        try:
            attempt.load_state_dict(dict(table), strict=True)
        except Exception:  # whatever its code says: it does not take this dictionary
            continue
        taken.append((at, attempt))
    if len(taken) > 1:
        raise ValueError(
            f"checkpoint {contents.source} has several dictionaries that the network takes: {[at for at, _ in taken]}; "
            "say which by key="
        )
    return taken[0][1] if taken else None


def _reads_itself(module: nn.Module) -> bool:
    own = type(module)
    return (
        own._load_from_state_dict is not nn.Module._load_from_state_dict
        and not own.__module__.startswith("torch.nn.modules.batchnorm")
    ) or own.load_state_dict is not nn.Module.load_state_dict
