"""Members from files, and ensembles to and from files. Nothing here executes code from a checkpoint."""

import copy
import glob
import inspect
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor, nn

from fastens import rules, schedules
from fastens.files import whole
from fastens.internal import engine_of, settings_of
from fastens.io import containers, described, hub, stacks
from fastens.io.choice import Wish
from fastens.io.members import Factory, load_member
from fastens.io.torch_files import refusal
from fastens.modes import evaluating, moved
from fastens.network.loading import save_own
from fastens.network.overlaps import overlapping, trained_together
from fastens.network.stacking import AS_THEY_ARE, Placement, Stacked, make_skeleton, tensors_of
from fastens.pickled import KINDS, rebuild
from fastens.settings import check_settings

if TYPE_CHECKING:
    from fastens.ensemble import Ensemble

_CONFIG = "config.json"


class Checkpoints(Sequence[nn.Module]):
    """Members in files, each read when it is asked for, so that one at a time is in memory."""

    def __init__(
        self,
        paths: Sequence[Path],
        factory: Factory | None,
        wishes: Sequence[Wish],
        allow_pickle: bool = False,
        place: Placement = AS_THEY_ARE,
    ) -> None:
        self.paths = list(paths)
        self._factory = factory
        self._wishes = list(wishes)
        self._allow_pickle = allow_pickle
        self._place = place
        self._made: WeakSet[nn.Module] = WeakSet()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, k: Any) -> Any:
        if isinstance(k, slice):
            return [self[i] for i in range(*k.indices(len(self)))]
        member = load_member(self.paths[k], self._factory and self._make, self._wishes[k], self._allow_pickle)
        self._made.add(member)
        return moved(member, *self._place.arguments) if self._place.changes else member

    def _make(self) -> nn.Module:
        assert self._factory is not None
        network = self._factory()
        # A factory that returns one network again and again must not change the members made of it before.
        return copy.deepcopy(network) if network in self._made else network

    def __iter__(self) -> Iterator[nn.Module]:
        return (self[k] for k in range(len(self)))


def load_members(
    paths: Sequence[str | Path] | str,
    factory: Factory | None = None,
    ema: bool = True,
    *,
    key: str | Sequence[str] | None = None,
    prefix: str | None = None,
    variant: str | None = None,
    allow_pickle: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Checkpoints:
    """Name the checkpoints of K members; they are read one at a time, when an ensemble takes them, and infer.

    A file is read as what its first bytes say (safetensors, shards by their index, torch files, pickles), a folder as
    a diffusers model, a pipeline or a state of accelerate. Wherever the network's names occur in it, with its shapes
    and behind any prefix, wrappers' names left out, is a candidate. Names in front that say "ema", "averaged",
    "shadow", ... make it an average. Where one candidate is of the kind that ``ema`` asks for, it is taken; where
    several are, or a name like "ema" is not understood, the error lists them. ``fastens inspect FILE`` shows them.

    Args:
        paths: files and folders, or patterns (``runs/*/ema.pt``), whose matches are members in natural order; or ids of
            the Hugging Face hub that are in its cache on this machine.
        factory: makes a member without its weights; needed where the checkpoint does not describe its network.
        ema: take the exponential moving average of the weights where a checkpoint holds both.
        key: full name of the dictionary in a file, or of the model or file in a folder, that holds the weights; or one
            for each member, as of the averages of several lengths in one file.
        prefix: what stands in front of the network's names in that dictionary (``model.diffusion_model``).
        variant: of the files in a diffusers folder (``fp16``, ``ema``, ``non_ema``).
        allow_pickle: also read pickles, which can run any code: only for files whose authors you trust.
        device: where each member is put; none for where its checkpoint is read to.
        dtype: of its floating-point tensors; none for the checkpoint's.

    Returns:
        A lazy sequence of modules in evaluation mode.

    Raises:
        FileNotFoundError: a path that does not exist, a pattern without matches, a hub id that is not in the cache.
        TypeError: one path that is no pattern, a dtype that is none of floating point.
        ValueError: no paths, one named twice by patterns; a file without a factory; when read: a damaged checkpoint,
            one of another architecture, one that would have to execute code, or one with several candidates.
    """
    if isinstance(paths, Path) or (isinstance(paths, str) and not glob.has_magic(paths)):
        raise TypeError(f"paths is one path, expected a sequence of them: load_members([{str(paths)!r}])")
    found = [hub.cached(path) or path for path in _matches([paths] if isinstance(paths, str) else paths)]
    if not found:
        raise ValueError("paths is empty, expected at least one checkpoint")
    for path in found:
        if not path.exists():
            raise FileNotFoundError(f"checkpoint {path} does not exist")
        if containers.is_pickle(path) and not allow_pickle:
            raise ValueError(refusal(path, []))
        if path.is_file() and not allow_pickle and factory is None:
            raise ValueError(
                f"checkpoint {path} is a file of weights; pass factory=, a function that makes the network"
            )
    keys = [key] * len(found) if key is None or isinstance(key, str) else list(key)
    if len(keys) != len(found):
        raise ValueError(f"key names {len(keys)} dictionaries for {len(found)} checkpoints, expected one for each")
    return Checkpoints(
        found, factory, [Wish(ema, each, prefix, variant) for each in keys], allow_pickle, Placement.of(device, dtype)
    )


def _matches(paths: Sequence[str | Path]) -> list[Path]:
    """Paths, each pattern replaced by what it matches, snapshot 2 before snapshot 10."""
    found: list[Path] = []
    matched: set[Path] = set()
    for path in paths:
        if not glob.has_magic(str(path)) or Path(path).exists():
            found.append(Path(path))
            continue
        new = sorted(map(Path, glob.glob(str(path), recursive=True)), key=_natural)
        if not new:
            raise FileNotFoundError(f"no checkpoint matches {str(path)!r}")
        matched.update(new)
        found += new
    twice = sorted(str(path) for path in matched if found.count(path) > 1)
    if twice:
        raise ValueError(f"checkpoint {twice[0]} is named twice, by a pattern and beside it; each member counts once")
    return found


def _natural(path: Path) -> list[tuple[bool, Any]]:
    parts = re.split(r"(\d+(?:\.\d+)?)", str(path))
    return [(True, float(part)) if i % 2 else (False, part) for i, part in enumerate(parts)]


def save_ensemble(
    ensemble: "Ensemble",
    directory: str | Path,
    variant: str | None = None,
    max_shard_size: int | str | None = None,
) -> None:
    """Write an ensemble: a safetensors file with its stacks, ``config.json`` with rule and member configuration.

    Args:
        ensemble: whose members are of one structure.
        directory: the folder; one that holds an ensemble gets this one in its place, other variants' files stay.
        variant: a part of the file's name (``fp16``), to be said again when it is loaded.
        max_shard_size: in bytes, or as ``"5GB"``: larger stacks go into several files; none for one file.

    Raises:
        ValueError: members of different structure, which have no stacks; a variant or a size that is none.
        OSError: the directory cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    engine = engine_of(ensemble)
    if engine is None:
        raise ValueError("members of different structure have no common stacks; save them one by one")
    directory, variant = Path(directory), stacks.checked_variant(variant)
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors_of(ensemble.network).items()}
    if engine.behaviour.looped:
        save_own(engine.views, tensors, "")
    base = _base(type(ensemble).__name__)
    files: dict[str, Any] = dict(stacks.split(tensors, base, variant, max_shard_size))
    if len(files) > 1:
        weight_map = {name: file for file, shard in files.items() for name in shard}
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        files[stacks.index_name(base, variant)] = json.dumps(index, indent=2) + "\n"
    skeleton = engine.skeleton
    prediction = settings_of(ensemble)["prediction"]
    config = {
        "_class_name": type(ensemble).__name__,
        "num_members": ensemble.num_members,
        "rule": ensemble.rule.to_dict(),
        "shared": sorted(engine.shared),
        "settings": {**settings_of(ensemble), "prediction": prediction.to_dict(), "schedule": None},
        "member_class": f"{type(skeleton).__module__}:{type(skeleton).__qualname__}",
        "member_config": _plain(dict(cast(Any, skeleton.config))) if hasattr(skeleton, "from_config") else None,
    }
    files[_CONFIG] = json.dumps(config, indent=2) + "\n"
    first, *more = (directory / name for name in files)
    try:
        with whole(first, *more) as partials:
            for partial, content in zip(partials, files.values(), strict=True):
                if isinstance(content, str):
                    partial.write_text(content)
                else:
                    save_file(content, partial)
        stacks.remove_others(directory, set(files), variant)
    except (OSError, SafetensorError) as error:
        raise OSError(f"the folder {directory} cannot be written: {error}; choose another") from error


def _base(class_name: Any) -> str:
    return stacks.DIFFUSERS if str(class_name).startswith("Diffusers") else stacks.OTHERS


def _plain(config: dict[str, Any]) -> dict[str, Any] | None:
    """Return a configuration that survives JSON, None for one that does not: loading then needs a factory."""
    try:
        return json.loads(json.dumps(config, default=_as_json))
    except TypeError:
        return None


def _as_json(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Path):
        return value.as_posix()
    raise TypeError(f"a {type(value).__name__} has no form in JSON")


def load_ensemble(
    directory: str | Path,
    factory: Factory | None = None,
    torch_dtype: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    variant: str | None = None,
    subfolder: str | None = None,
    **others: Any,
) -> "Ensemble":
    """Read what :func:`save_ensemble` wrote.

    Args:
        directory: the folder.
        factory: makes a member; needed unless members are diffusers models.
        torch_dtype: convert floating-point tensors to it, but for those that diffusers keeps in float32.
        dtype: the same, as newer diffusers call it.
        device: where the stacks are put; none for the CPU.
        variant: with which it was saved.
        subfolder: of ``directory``, that holds it.
        **others: further keywords of diffusers' loaders (``low_cpu_mem_usage``, ...), which do not apply.

    Raises:
        FileNotFoundError: no such folder, or no file of this variant in it, which is a ValueError too.
        ValueError: a file that cannot be read, or does not fit the member; a keyword that asks for what there is not.
    """
    refused = [name for name in ("quantization_config", "output_loading_info", "use_flashpack") if others.get(name)]
    if refused:
        raise ValueError(f"an ensemble is loaded without {refused[0]}; leave it out")
    directory, variant = Path(directory, subfolder or ""), stacks.checked_variant(variant)
    wanted_dtype = torch_dtype or dtype
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is no folder")
    file = directory / _CONFIG
    if not file.is_file():
        raise ValueError(f"checkpoint {directory} has no {_CONFIG}, so it is no saved ensemble")
    config = _checked(file, containers.read_json(file))
    num_members, settings = config["num_members"], config["settings"]
    if factory is None and config.get("member_config") is None:
        raise ValueError(f"{directory} holds members of class {config['member_class']}; pass factory=, which makes one")
    weights = directory / stacks.file_name(base := _base(config.get("_class_name")), variant)
    found = stacks.read(directory, base, variant)
    if factory is not None:
        member = factory()
    else:
        name = config["member_class"].rpartition(":")[2]
        numbers = sum(stack.numel() for stack in found.values())
        member = described.make(file, name, config["member_config"], numbers)
    skeleton = make_skeleton(evaluating(member))
    if (pair := trained_together(member)) is not None:
        raise ValueError(
            f"{' and '.join(pair)} share memory in the member and are trained, which stacks hold apart: freeze them in "
            "what factory makes, by requires_grad_(False)"
        )
    shared = frozenset(config["shared"])
    _check_fit(weights, skeleton, found, shared, num_members)
    wanted: dict[str, Tensor] = {}
    exact = described.kept_in_float32(member)
    for name, like in tensors_of(skeleton).items():
        stack = found[name]
        if wanted_dtype is not None and stack.is_floating_point():
            stack = stack.to(torch.float32 if exact.intersection(name.split(".")) else wanted_dtype)
        wanted[name] = nn.Parameter(stack, like.requires_grad) if isinstance(like, nn.Parameter) else stack
    content = Stacked(skeleton, wanted, shared, overlapping([member]))
    ensemble = evaluating(rebuild(num_members, config["rule"], settings, content, KINDS["masks" in settings]))
    return ensemble if device is None else ensemble.to(device)


def _checked(file: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a saved ensemble, held to what its constructor would accept.

    Raises:
        ValueError: a value is missing, of another type, or one that no ensemble has.
    """
    wanted = {"num_members": int, "rule": dict, "shared": list, "settings": dict, "member_class": str}
    missing = [key for key in wanted if key not in config]
    if "num_members" in missing:
        raise ValueError(f"{file} describes no ensemble; for single members use load_members([...])")
    if missing:
        raise ValueError(f"{file} lacks {', '.join(missing)}: save the ensemble again")
    for key, kind in wanted.items():
        if not isinstance(config[key], kind) or isinstance(config[key], bool):
            raise ValueError(f"{file}: {key} is {_shown(config[key])}, expected {kind.__name__}")
    if config["num_members"] < 1:
        raise ValueError(f"{file}: num_members is {config['num_members']}, expected at least one")
    if not all(isinstance(name, str) for name in config["shared"]):
        raise ValueError(f"{file}: shared is {_shown(config['shared'])}, expected names of tensors")
    try:
        rule = rules.from_dict(config["rule"])
        return {**config, "rule": rule, "settings": _settings(config["settings"])}
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise ValueError(f"{file} describes no ensemble: {error}") from error


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:77]}..."


def _settings(saved: dict[str, Any]) -> dict[str, Any]:
    masks = {name: saved[name] for name in ("masks", "p", "seed") if name in saved}
    known = inspect.signature(check_settings).parameters
    options: dict[str, Any] = {
        name: None if each.default is each.empty else each.default for name, each in known.items()
    }
    unknown = sorted(saved.keys() - options.keys() - masks.keys())
    if unknown:
        raise ValueError(f"settings has {unknown[:3]}, expected {', '.join(options)}")
    options.update({name: value for name, value in saved.items() if name not in masks})
    options["prediction"] = schedules.prediction_from_dict(options["prediction"])
    if options["schedule"] is not None:
        options["schedule"] = schedules.from_dict(options["schedule"])
    max_fold = options["max_fold"]
    if max_fold is not None and (not isinstance(max_fold, int) or isinstance(max_fold, bool)):
        raise ValueError(f"max_fold is {_shown(max_fold)}, expected a number of rows")
    settings = check_settings(**options)
    if masks:
        _check_masks(**masks)
    return {**settings, **masks}


def _check_masks(masks: Any, p: Any, seed: Any) -> None:
    """Raise ValueError unless these are settings of :class:`fastens.MCDropout`."""
    if masks not in ("fixed", "fresh"):
        raise ValueError(f"masks {_shown(masks)} is unknown, expected 'fixed' or 'fresh'")
    if p is not None and not (isinstance(p, float) and 0 < p < 1):
        raise ValueError(f"p is {_shown(p)}, expected a probability above 0 and below 1, or none")
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ValueError(f"seed is {_shown(seed)}, expected an integer")


def _check_fit(
    file: Path, skeleton: nn.Module, found: dict[str, Tensor], shared: frozenset[str], num_members: int
) -> None:
    expected = tensors_of(skeleton)
    for name, like in expected.items():
        shape = tuple(like.shape) if name in shared else (num_members, *like.shape)
        its = tuple(found[name].shape) if name in found else None
        if its != shape:
            raise ValueError(f"weights {file}: {name} is {its}, the member needs {shape}")
        if like.is_floating_point() != found[name].is_floating_point():
            raise ValueError(f"weights {file}: {name} is {found[name].dtype}, the member needs {like.dtype}")
    unknown = sorted((shared | found.keys()) - expected.keys())
    if unknown:
        raise ValueError(
            f"weights {file}: the member has no {', '.join(unknown[:3])}; what its calls register has to be there "
            "before: register it in the module's __init__"
        )
