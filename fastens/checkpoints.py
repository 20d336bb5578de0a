"""Members from files, and ensembles to and from files. Nothing here executes code from a checkpoint."""

import json
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastens import rules, schedules
from fastens.dropout import MCDropout
from fastens.ensemble import Ensemble, rebuild
from fastens.files import whole
from fastens.fold.members import make_skeleton, tensors_of

_WEIGHTS = "diffusion_pytorch_model.safetensors"
_STACKS = "ensemble.safetensors"
_CONFIG = "config.json"
# Under which names training code keeps the averaged weights and the weights: score_sde, k-diffusion, torchcfm,
# denoising-diffusion-pytorch, EDM and many a script.
_EMA_KEYS = ("ema", "ema_state_dict", "model_ema", "ema_model")
_STATE_KEYS = ("state_dict", "model", "model_state_dict", "net_model", "net")

Factory = Callable[[], nn.Module]


class Checkpoints(Sequence[nn.Module]):
    """Members in files, each read when it is asked for, so that one at a time is in memory."""

    def __init__(
        self, paths: Sequence[str | Path], factory: Factory | None, ema: bool, allow_pickle: bool = False
    ) -> None:
        self._paths = [Path(path) for path in paths]
        self._factory = factory
        self._ema = ema
        self._allow_pickle = allow_pickle

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, k: Any) -> Any:
        if isinstance(k, slice):
            return [self[i] for i in range(*k.indices(len(self)))]
        return _load_member(self._paths[k], self._factory, self._ema, self._allow_pickle)

    def __iter__(self) -> Iterator[nn.Module]:
        return (self[k] for k in range(len(self)))


def load_members(
    paths: Sequence[str | Path], factory: Factory | None = None, ema: bool = True, *, allow_pickle: bool = False
) -> Checkpoints:
    """Name the checkpoints of K members; they are read one at a time, when an ensemble takes them.

    Args:
        paths: diffusers folders, or files: safetensors, or torch files that hold tensors only (a state dict as
            guided-diffusion writes it, or one among other things: score_sde, k-diffusion, torchcfm,
            denoising-diffusion-pytorch), or pickled networks (EDM).
        factory: makes a member without its weights; needed for files of weights.
        ema: take the exponential moving average of the weights where a file holds both.
        allow_pickle: also read pickles, which can run any code: only for files whose authors you trust.

    Returns:
        A lazy sequence of modules.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: no paths; a file without a factory; when read: a truncated checkpoint, one of another architecture,
            or one that would have to execute code.
    """
    if isinstance(paths, str | Path):
        raise TypeError(f"paths is one path, expected a sequence of them: load_members([{str(paths)!r}])")
    if len(paths) == 0:
        raise ValueError("paths is empty, expected at least one checkpoint")
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"checkpoint {path} does not exist")
        pickled = path.suffix in (".pkl", ".pickle")
        if pickled and not allow_pickle:
            raise ValueError(_refusal(path))
        if path.is_file() and not pickled and factory is None:
            raise ValueError(
                f"checkpoint {path} is a file of weights; pass factory=, a function that makes the network"
            )
    return Checkpoints(paths, factory, ema, allow_pickle)


def _refusal(path: Path) -> str:
    return (
        f"checkpoint {path} is a pickle, which can execute code when it is read; if you trust it, pass "
        "allow_pickle=True to load_members, or load it yourself and save its weights with "
        "safetensors.torch.save_file(model.state_dict(), ...) or model.save_pretrained(...)"
    )


def _load_member(path: Path, factory: Factory | None, ema: bool, allow_pickle: bool) -> nn.Module:
    if path.is_dir():
        return _load_diffusers(path)
    if path.suffix in (".pkl", ".pickle"):
        return _load_pickle(path, ema)
    assert factory is not None
    if path.suffix == ".safetensors":
        state: Any = _read_safetensors(path)
    else:
        try:
            state = torch.load(path, map_location="cpu", weights_only=not allow_pickle)
        except pickle.UnpicklingError as error:
            raise ValueError(_refusal(path)) from error
        except (RuntimeError, EOFError, OSError) as error:
            raise ValueError(f"checkpoint {path} cannot be read, it may be truncated: {error}") from error
    member = factory()
    weights, shadow = _find_weights(path, state, ema)
    try:
        member.load_state_dict(_without_prefix(weights, member))
    except RuntimeError as error:
        raise ValueError(f"checkpoint {path} does not fit the network that factory makes: {error}") from error
    if shadow is not None:
        _apply_shadow(path, member, shadow)
    return member


def _load_pickle(path: Path, ema: bool) -> nn.Module:
    """The network in an EDM snapshot, ``{"ema": network, ...}``; the code that made it must be importable."""
    with path.open("rb") as file:
        content = pickle.load(file)
    if isinstance(content, dict):
        keys = ("ema", "G_ema", "net") if ema else ("net", "ema", "G_ema")
        content = next((content[key] for key in keys if isinstance(content.get(key), nn.Module)), content)
    if not isinstance(content, nn.Module):
        raise ValueError(f"checkpoint {path} holds no network, neither itself nor under 'ema' or 'net'")
    return content.eval()


def _find_weights(path: Path, state: Any, ema: bool) -> tuple[dict[str, Tensor], list[Tensor] | None]:
    """The state dict in a torch file; and score_sde's averaged parameters, which are a list without names."""

    def tensors(value: Any) -> dict[str, Tensor] | None:
        if not isinstance(value, dict) or not value:
            return None
        found = {k: v for k, v in value.items() if isinstance(k, str) and isinstance(v, Tensor)}
        return found if len(found) == len(value) else None

    if not isinstance(state, dict):
        raise ValueError(f"checkpoint {path} holds a {type(state).__name__}, which is no dictionary of tensors")
    shadow = None
    for key in _EMA_KEYS if ema else ():
        value = state.get(key)
        if isinstance(value, dict) and isinstance(value.get("shadow_params"), list):
            shadow = value["shadow_params"]
            break
        weights = tensors(value)
        if weights is not None:
            return weights, None
    for key in _STATE_KEYS:
        weights = tensors(state.get(key))
        if weights is not None:
            return weights, shadow
    weights = tensors(state)
    if weights is None:
        hint = "; it looks like an optimiser's state, take the model's file" if "param_groups" in state else ""
        raise ValueError(
            f"checkpoint {path} holds no dictionary of tensors, nor one under {_EMA_KEYS + _STATE_KEYS}; it has "
            f"{sorted(map(str, state))[:8]}{hint}"
        )
    return weights, None


def _without_prefix(weights: dict[str, Tensor], member: nn.Module) -> dict[str, Tensor]:
    """The weights under the member's names, where wrappers (DataParallel, a diffusion class, EMA) put names before.

    Of several prefixes that hold the whole member, one with "ema" is taken, as ema-pytorch keeps both copies.
    """
    names = list(member.state_dict())
    if not names or names[0] in weights:
        return weights
    prefixes = [name.removesuffix(names[0]) for name in weights if name.endswith(f".{names[0]}")]
    complete = [prefix for prefix in prefixes if all(prefix + name in weights for name in names)]
    if not complete:
        return weights
    prefix = next((prefix for prefix in complete if "ema" in prefix), complete[0])
    return {name: weights[prefix + name] for name in names}


def _apply_shadow(path: Path, member: nn.Module, shadow: list[Tensor]) -> None:
    """Copy averaged parameters over the member's trainable ones, in their order, as score_sde's ``copy_to`` does."""
    trainable = [(name, p) for name, p in member.named_parameters() if p.requires_grad]
    if len(shadow) != len(trainable):
        raise ValueError(
            f"checkpoint {path} has {len(shadow)} averaged parameters, but the network that factory makes has "
            f"{len(trainable)} trainable ones"
        )
    for (name, parameter), average in zip(trainable, shadow, strict=True):
        if parameter.shape != average.shape:
            raise ValueError(
                f"checkpoint {path}: the averaged parameter in the place of {name} is {list(average.shape)}, expected "
                f"{list(parameter.shape)}"
            )
        parameter.data.copy_(average)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise ValueError(f"checkpoint {path.parent} has no {path.name}")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"checkpoint {path} cannot be read, it may be truncated: {error}") from error


def _read_config(directory: Path) -> dict[str, Any]:
    try:
        return json.loads((directory / _CONFIG).read_text())
    except FileNotFoundError:
        raise ValueError(f"checkpoint {directory} has no {_CONFIG}, so it is no diffusers folder") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"checkpoint {directory / _CONFIG} cannot be read: {error}") from error


def _diffusers_class(directory: Path, config: dict[str, Any]) -> Any:
    name = config.get("_class_name")
    try:
        import diffusers
    except ImportError as error:
        raise ImportError(f"{directory} is a diffusers folder: pip install 'fastens[diffusers]'") from error
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if found is None:
        raise ValueError(
            f"{directory / _CONFIG} names the class {name!r}, which diffusers {diffusers.__version__} has not"
        )
    return found


def _load_diffusers(directory: Path) -> nn.Module:
    model_class = _diffusers_class(directory, _read_config(directory))
    weights = list(directory.glob("*.safetensors"))
    if not weights:
        if list(directory.glob("*.bin")):
            raise ValueError(_refusal(next(directory.glob("*.bin"))))
        raise ValueError(f"checkpoint {directory} has no weights, expected {_WEIGHTS}")
    for file in weights:
        _check_safetensors(file)
    described = f"does not fit the {model_class.__name__} that its {_CONFIG} describes"
    try:
        member, info = model_class.from_pretrained(
            directory, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True, local_files_only=True
        )
    except RuntimeError as error:
        raise ValueError(f"checkpoint {directory} {described}, is it of another architecture? {error}") from error
    if info["missing_keys"] or info["unexpected_keys"] or info.get("mismatched_keys"):
        missing, unexpected = sorted(info["missing_keys"])[:3], sorted(info["unexpected_keys"])[:3]
        raise ValueError(
            f"checkpoint {directory} {described}, is it of another architecture? missing {missing}, "
            f"unexpected {unexpected}"
        )
    return member


def _check_safetensors(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            file.keys()
    except (SafetensorError, OSError) as error:
        raise ValueError(f"checkpoint {path} cannot be read, it may be truncated: {error}") from error


def save_ensemble(ensemble: Ensemble, directory: str | Path) -> None:
    """Write an ensemble: ``ensemble.safetensors`` with its stacks, ``config.json`` with rule and member configuration.

    Raises:
        ValueError: members of different structure, which have no stacks.
        OSError: the directory cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if ensemble._engine is None:
        raise ValueError("members of different structure have no common stacks; save them one by one")
    directory = Path(directory)
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors_of(ensemble.network).items()}
    skeleton = ensemble._engine.skeleton
    prediction = ensemble._settings["prediction"]
    config = {
        "_class_name": type(ensemble).__name__,
        "num_members": ensemble.num_members,
        "rule": ensemble.rule.to_dict(),
        "shared": sorted(ensemble._engine.shared),
        "settings": {**ensemble._settings, "prediction": prediction.to_dict(), "schedule": None},
        "member_class": f"{type(skeleton).__module__}:{type(skeleton).__qualname__}",
        "member_config": dict(skeleton.config) if hasattr(skeleton, "from_config") else None,  # pyright: ignore
    }
    try:
        with whole(directory / _STACKS, directory / _CONFIG) as (stacks, described):
            save_file(tensors, stacks)
            described.write_text(json.dumps(config, indent=2, default=str) + "\n")
    except (OSError, SafetensorError) as error:
        raise OSError(f"the folder {directory} cannot be written: {error}; choose another") from error


def load_ensemble(
    directory: str | Path,
    factory: Factory | None = None,
    torch_dtype: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
    **_: Any,
) -> Ensemble:
    """Read what :func:`save_ensemble` wrote.

    Args:
        directory: the folder.
        factory: makes a member; needed unless members are diffusers models.
        torch_dtype: convert floating-point tensors to it.
        dtype: the same, as newer diffusers call it.
        **_: further keywords of diffusers' loaders (``device_map``, ``variant``, ...), which do not apply.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a file that cannot be read, or does not fit the member.
    """
    directory = Path(directory)
    wanted_dtype = torch_dtype or dtype
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is no folder")
    config = _read_config(directory)
    missing = [key for key in ("num_members", "rule", "shared", "settings", "member_class") if key not in config]
    if "num_members" in missing:
        raise ValueError(f"{directory / _CONFIG} describes no ensemble; for single members use load_members([...])")
    if missing:
        raise ValueError(f"{directory / _CONFIG} lacks {', '.join(missing)}: save the ensemble again")
    if factory is not None:
        member = factory()
    elif config.get("member_config") is not None:
        name = config["member_class"].rpartition(":")[2]
        member = _diffusers_class(directory, {"_class_name": name}).from_config(config["member_config"])
    else:
        raise ValueError(f"{directory} holds members of class {config['member_class']}; pass factory=, which makes one")
    stacks = _read_safetensors(directory / _STACKS)
    skeleton = make_skeleton(member.eval())
    shared = frozenset(config["shared"])
    kind = MCDropout if "masks" in config["settings"] else Ensemble  # masks have one set of weights
    _check_fit(directory, skeleton, stacks, shared, config["num_members"] if kind is Ensemble else 1)
    wanted: dict[str, Tensor] = {}
    for name, like in tensors_of(skeleton).items():
        stack = stacks[name]
        if wanted_dtype is not None and stack.is_floating_point():
            stack = stack.to(wanted_dtype)
        wanted[name] = nn.Parameter(stack, like.requires_grad) if isinstance(like, nn.Parameter) else stack
    settings = {"aggregate_in": None, **config["settings"]}
    said = schedules.prediction_from_dict(settings.get("prediction"))
    schedule = settings.get("schedule")  # apart from the prediction in older files
    said = said.filled(schedule=schedules.from_dict(schedule) if schedule else None)
    settings.update(prediction=said, schedule=said.schedule)
    content = (skeleton, wanted, shared)
    return rebuild(config["num_members"], rules.from_dict(config["rule"]), settings, content, False, kind)


def _check_fit(
    directory: Path, skeleton: nn.Module, stacks: dict[str, Tensor], shared: frozenset[str], num_members: int
) -> None:
    for name, like in tensors_of(skeleton).items():
        shape = tuple(like.shape) if name in shared else (num_members, *like.shape)
        found = tuple(stacks[name].shape) if name in stacks else None
        if found != shape:
            raise ValueError(f"{directory / _STACKS}: {name} is {found}, the member needs {shape}")
