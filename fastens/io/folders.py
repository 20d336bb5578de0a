"""Folders: diffusers models with their variants, pipelines, and the states that accelerate saves."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from fastens.io import containers
from fastens.io.choice import Wish
from fastens.io.contents import Contents
from fastens.io.names import EMA, RAW, UNCLEAR, UNSAID, kind_of

CONFIG = "config.json"
_BASES = ("diffusion_pytorch_model", "model", "pytorch_model")
_WEIGHTS = (".safetensors", *containers.TORCH_SUFFIXES)
_FILE = re.compile(
    r"(?P<base>[\w-]+?)(?:\.(?P<variant>[\w.-]+?))?\.(?P<suffix>safetensors|bin)(?P<index>\.index(?:\.(?P<late>[\w-]+))?\.json)?$"
)
_MODEL = re.compile(r"(pytorch_)?model(_\d+)?\.(safetensors|bin)$")  # of accelerate, one or several
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
_PRECISIONS = frozenset(("fp16", "bf16", "fp32", "float16", "bfloat16", "float32", "half", "fp8", "int8"))
_FULL = frozenset(("fp32", "float32"))
_STATE = re.compile(r"(optimizer|scheduler|sampler|scaler|random_states|training_args|rng_state|dl_state)[\w-]*\.\w+$")
_ADAPTERS = ("adapter_config.json", "adapter_model.", "pytorch_lora_weights.")
_NO_DENOISER = re.compile(r"Autoencoder|VQModel|ControlNet|Adapter|CLIP|Encoder|Vocoder|Upsampl|Safety|Projection")


class Weights(NamedTuple):
    """A file of weights in a folder, or the index of several."""

    path: Path
    base: str
    variant: str | None

    @property
    def words(self) -> list[str]:
        """The parts of the variant's name."""
        return re.split(r"[._-]", self.variant) if self.variant else []

    @property
    def kind(self) -> str:
        """What the name says: an average, raw weights, nothing; other words of a variant are UNCLEAR."""
        if self.base not in _BASES and kind_of((self.base,)) != UNSAID:
            return kind_of((self.base,))
        rest = [word for word in self.words if word not in _PRECISIONS]
        said = kind_of(["_".join(rest)] if rest else [])
        return UNCLEAR if rest and said == UNSAID else said

    @property
    def reduced(self) -> bool:
        """Whether it holds the weights at a lower precision."""
        return bool(_PRECISIONS.intersection(self.words)) and not _FULL.intersection(self.words)


def weights_in(folder: Path) -> list[Weights]:
    """The files of weights in a folder, one per variant: safetensors before torch files, sharded before whole.

    Of the latter diffusers takes the shards: who saves shards over a whole file leaves that, and who saves a whole file
    over shards takes those away, so that their index names what is missing.
    """
    found: dict[tuple[str, str | None], tuple[tuple[bool, bool], Weights]] = {}
    for path in sorted(folder.iterdir()):
        match = _FILE.match(path.name)
        if match is None or not path.is_file() or _SHARD.search(path.name) or _STATE.match(path.name):
            continue
        variant = match["late"] or match["variant"]
        base = "model" if match["base"] == "pytorch_model" else match["base"]
        order = match["suffix"] == "bin", match["index"] is None
        known = found.get((base, variant))
        if known is None or order < known[0]:
            found[base, variant] = order, Weights(path, base, variant)
    every = [weights for _, weights in found.values()]
    for base in _BASES:
        usual = [weights for weights in every if weights.base == base]
        if usual:
            return usual
    return every


def averages_beside(folder: Path) -> list[Path]:
    """Files of weights and folders of such that are called averages, beside a model's own files and their variants."""
    own = {weights.path for weights in weights_in(folder) if weights.base in _BASES}
    found = []
    for path in sorted(folder.iterdir()):
        plain = _SHARD.search(path.name) or _STATE.match(path.name) or path.name.startswith("custom_checkpoint")
        if path in own or plain or kind_of((_key(path),)) not in (EMA, UNCLEAR):
            continue
        named = path.suffix in _WEIGHTS or containers.is_index(path)
        if weights_in(path) if path.is_dir() else (named and path.is_file()):
            found.append(path)
    return found


def _key(path: Path) -> str:
    """A file or folder in a folder as ``key=`` takes it."""
    return path.name if path.is_dir() else containers.stem(path)


def choose_weights(folder: Path, wish: Wish) -> Weights:
    """The variant in a folder that is meant.

    ``ema`` in a variant's name says average, ``non_ema`` raw; a plain file beside an average is raw, and an average
    beside ``non_ema``, as diffusers writes them. Variants of lower precision are copies, taken where there is no other.

    Raises:
        ValueError: no weights, none of the wanted variant, or several.
    """
    every = weights_in(folder)
    if not every:
        raise ValueError(f"checkpoint {folder} has no weights, expected {_BASES[0]}.safetensors{_advice(folder)}")
    if wish.variant is not None:
        pool = [weights for weights in every if weights.variant == wish.variant]
    elif len(every) == 1 and (wish.ema or every[0].kind != EMA):
        pool = every
    else:
        pool = _of_kind(every, wish.ema)
        pool = [weights for weights in pool if not weights.reduced] or pool
        if any(w.kind == UNSAID and w.variant for w in pool):  # a copy of what is not there, or of the other variants
            pool += [w for w in every if w.kind == UNCLEAR]
    if len(pool) != 1:
        names = ", ".join(f"{weights.path.name} (variant={weights.variant!r})" for weights in every)
        asked = f"variant={wish.variant!r}" if wish.variant is not None else f"ema={wish.ema}"
        raise ValueError(
            f"checkpoint {folder} has {'several' if pool else 'no'} weights for {asked}; it has {names}: say which by "
            "variant="
        )
    return pool[0]


def _of_kind(every: list[Weights], ema: bool) -> list[Weights]:
    kinds: dict[str, list[Weights]] = {kind: [w for w in every if w.kind == kind] for kind in (EMA, RAW, UNSAID)}
    if ema and any(w.kind == UNCLEAR and "ema" in w.variant for w in every if w.variant):
        return every
    if ema:
        return kinds[EMA] or kinds[UNSAID] or kinds[RAW]
    return kinds[RAW] or kinds[UNSAID]


def _advice(folder: Path) -> str:
    names = {path.name for path in folder.iterdir()}
    others = [f"; {name} is {what}" for name in sorted(names) if (what := containers.other_format(Path(name)))]
    if others:
        return others[0]
    if "manifest.ocdbt" in names or "_CHECKPOINT_METADATA" in names:
        return "; it is a checkpoint of Orbax, of JAX: convert its weights to safetensors"
    if "zero_to_fp32.py" in names or any(name.startswith("mp_rank") for name in names):
        return "; it is a DeepSpeed checkpoint: its zero_to_fp32.py makes one file of it"
    if ".metadata" in names or any(name.endswith(".distcp") for name in names):
        return (
            "; it is a distributed checkpoint: torch.distributed.checkpoint.format_utils.dcp_to_torch_save makes one "
            "file of it"
        )
    return f"; it has {sorted(names)[:6]}" if names else "; it is empty"


def model_folder(folder: Path, wish: Wish) -> tuple[Path, Wish]:
    """The folder of the model that is meant: itself, or the denoiser of a pipeline or of a training state.

    Returns:
        The folder, and the wish without what chose it.

    Raises:
        ValueError: an ensemble, no model, or several (``key=`` names one).
    """
    config = folder / CONFIG
    if config.is_file():
        if "num_members" in containers.read_json(config):
            raise ValueError(
                f"{folder} is a saved ensemble, not a member: pass the checkpoints that it was made of, or read it in "
                "Python by fastens.Ensemble.from_pretrained"
            )
        return folder, wish
    parts = [path for path in sorted(folder.iterdir()) if (path / CONFIG).is_file()]
    named, _, rest = (wish.key or "").partition(".")
    if named and (folder / named).is_dir() and (folder / named) in parts:
        return model_folder(folder / named, Wish(wish.ema, rest or None, wish.prefix, wish.variant))
    denoisers = [path for path in parts if _is_denoiser(path)]
    kinds = {path: kind_of((path.name,)) for path in denoisers}
    averages = [path for path in denoisers if kinds[path] in (EMA, UNCLEAR)]
    plain = [path for path in denoisers if path not in averages]
    pool = (averages or plain) if wish.ema else plain
    if len(pool) == 1:
        left = [p.name for p in averages_beside(folder) if p not in parts and kind_of((_key(p),)) == EMA]
        if left and wish.ema and not averages:
            raise ValueError(
                f"checkpoint {folder} has {left[:3]} beside the model {pool[0].name}, which look like averages of its "
                f"weights: pass that itself, with factory=, or key={pool[0].name!r} for the model without it"
            )
        return model_folder(pool[0], wish)
    if denoisers:
        names = ", ".join(path.name for path in denoisers)
        raise ValueError(
            f"checkpoint {folder} holds the models {names}: say which by key=, as in key={denoisers[0].name!r}; "
            "if each is a member, pass them all"
        )
    return folder, wish


def _is_denoiser(path: Path) -> bool:
    name = containers.read_json(path / CONFIG).get("_class_name")
    return isinstance(name, str) and not _NO_DENOISER.search(name)


def read(folder: Path, wish: Wish, trusted: bool) -> Contents:
    """Read a folder's weights; of a training state of accelerate, all weights that it holds.

    Raises:
        ValueError: no weights, several variants that are meant, or a file that cannot be read.
    """
    custom = sorted(folder.glob("custom_checkpoint_*.pkl"))
    averages = averages_beside(folder) if wish.variant is None and (wish.ema or wish.key is not None) else []
    models = [path for path in sorted(folder.iterdir()) if _MODEL.match(path.name)]
    several = len({path.stem.removeprefix("pytorch_") for path in models}) > 1
    if not custom and not averages and not several:
        chosen = choose_weights(folder, wish)
        named = _is_named(chosen.path, wish)
        _check_no_adapters(folder, named)
        contents = containers.read(chosen.path, trusted)
        contents.source = str(folder)
        return _under(_key(chosen.path), contents) if named else contents
    contents = Contents(str(folder), "folder of several files")
    if not models or averages:  # in shards, of another name, or in variants
        every = [weights for weights in weights_in(folder) if weights.path not in averages]
        models = [w.path for w in every if w.kind in (EMA, UNCLEAR)]
        models += [choose_weights(folder, Wish(False, variant=wish.variant)).path] if len(models) < len(every) else []
    files = [*models, *custom, *averages]
    named = max((path for path in files if _is_named(path, wish)), key=lambda path: len(_key(path)), default=None)
    for path in [named] if named in models else files:  # what an average lacks may be in the others
        if path in custom and not wish.ema and wish.key is None:
            continue
        inner = choose_weights(path, Wish()).path if path.is_dir() else path
        try:
            part = _under(_key(path), containers.read(inner, trusted))
        except ValueError:
            if path not in models and wish.key is not None and not _is_named(path, wish):
                continue  # named is another
            raise
        contents.entries += part.entries
        contents.lists += part.lists
        for name in ("numbers", "opaque", "networks", "said"):
            getattr(contents, name).update(getattr(part, name))
    return contents


def _is_named(path: Path, wish: Wish) -> bool:
    """Whether ``key=`` begins with a file or folder of the folder."""
    return wish.key is not None and f"{wish.key}.".startswith(f"{_key(path)}.")


def _under(key: str, part: Contents) -> Contents:
    """The contents of a file under its name."""
    part.entries = [entry._replace(keys=(key, *entry.keys)) for entry in part.entries]
    part.lists = [unnamed._replace(keys=(key, *unnamed.keys)) for unnamed in part.lists]
    for name in ("numbers", "opaque", "networks", "said"):
        there = getattr(part, name)
        setattr(part, name, {f"{key}.{inner}" if inner else key: value for inner, value in there.items()})
    return part


def _check_no_adapters(folder: Path, named: bool) -> None:
    """Raise ValueError where an adapter lies beside the weights, which are not the whole without it."""
    found = sorted(path.name for path in folder.iterdir() if path.name.startswith(_ADAPTERS))
    if not found or named:
        return
    keys = [_key(weights.path) for weights in weights_in(folder) if not weights.path.name.startswith(_ADAPTERS)]
    without = f", or say key= of the file of weights without it, as in key={keys[0]!r}" if keys else ""
    raise ValueError(
        f"checkpoint {folder} holds an adapter (LoRA), {found[:2]}: merge it into the weights (merge_and_unload of "
        f"PEFT, fuse_lora of diffusers){without}"
    )
