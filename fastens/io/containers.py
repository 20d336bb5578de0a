"""Containers: what a file is, by its first bytes, and its contents; no code of any file is run unless it is trusted."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastens.io import torch_files
from fastens.io.contents import Contents

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".th", ".tar", ".pkl", ".pickle", ".model", ".pyt")
_PICKLES = (".pkl", ".pickle")
_INDEX = re.compile(r"\.index(\.[\w-]+)?\.json$")
_OTHERS = {
    ".gguf": "a GGUF file, whose weights are quantised",
    ".onnx": "an ONNX graph",
    ".msgpack": "weights of Flax",
    ".h5": "weights of Keras",
    ".npz": "an archive of NumPy arrays",
    ".distcp": "a part of a distributed checkpoint; torch.distributed.checkpoint.format_utils.dcp_to_torch_save makes "
    "one file of its folder",
}
# By their first bytes, whatever they are called: (where, bytes, what it is).
_BEGINNINGS = (
    (0, b"version https://git-lfs", "a pointer of Git LFS in place of the file: fetch that by git lfs pull"),
    (0, b"GGUF", "a GGUF file, whose weights are quantised: convert it to safetensors first"),
    (0, b"\x89HDF", "an HDF5 file, as Keras writes: convert it to safetensors first"),
    (0, b"\x93NUMPY", "an array of NumPy: convert it to safetensors first"),
    (0, b"\x1f\x8b", "compressed by gzip: decompress it first"),
    (257, b"ustar", "a tar archive, as NeMo writes: unpack it, and take the file of weights in it"),
    (0, b"<!DOCTYPE", "a web page in place of the file: download it again"),
    (0, b"<html", "a web page in place of the file: download it again"),
)


def _check_known(path: Path) -> None:
    """Raise ValueError for a file that is something else than weights of torch, and say what."""
    with path.open("rb") as file:
        start = file.read(300)
    if not start:
        raise ValueError(f"checkpoint {path} cannot be read, it may be truncated: it is empty")
    said = next((what for at, magic, what in _BEGINNINGS if start[at:].startswith(magic)), "")
    if start.startswith(b"PK\x03\x04"):
        names = torch_files.names_in_archive(path)
        if names and not any(name.rpartition("/")[2] in ("data.pkl", "constants.pkl") for name in names):
            said = f"an archive of {names[:3]}, which torch.save did not write: unpack or convert it first"
    if said:
        raise ValueError(f"checkpoint {path} cannot be read: it is {said}")


def is_pickle(path: Path) -> bool:
    """Whether reading a file means running a pickle: by its name, unless it is one of ``torch.save``'s archives."""
    return path.suffix in _PICKLES and path.is_file() and not torch_files.is_zip(path)


def other_format(path: Path) -> str:
    """What a file is that is not of torch, by its name; empty where that does not say."""
    return _OTHERS.get(path.suffix, "")


def is_index(path: Path) -> bool:
    """Whether a file, by its name, says which other files hold which tensors."""
    return _INDEX.search(path.name) is not None


def stem(path: Path) -> str:
    """A file's name without what says its format."""
    name = _INDEX.sub("", path.name)
    return next((name.removesuffix(end) for end in (".safetensors", *TORCH_SUFFIXES) if name.endswith(end)), name)


def read(path: Path, trusted: bool = False) -> Contents:
    """The contents of one file, or of the files that an index names.

    Args:
        path: a safetensors file, the index of a sharded checkpoint, a torch file, or a pickle.
        trusted: run the code that a pickle names.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is damaged, of no known format, or names code without being trusted.
    """
    if is_index(path):
        return _sharded(path, trusted)
    if other_format(path):
        raise ValueError(
            f"checkpoint {path} is {other_format(path)}; expected safetensors or a torch file, so convert it first"
        )
    _check_known(path)
    if path.suffix == ".safetensors" or _looks_like_safetensors(path):
        return _safetensors(path)
    if is_pickle(path):
        if not trusted:
            raise torch_files.NotRun(torch_files.refusal(path, []))
        return Contents(str(path), "pickle").add(torch_files.read_pickle(path))
    return Contents(str(path), "torch file").add(torch_files.read(path, trusted))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError: JSONDecodeError and UnicodeDecodeError are ones
        raise ValueError(f"checkpoint {path} cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"checkpoint {path} cannot be read: it holds a {type(content).__name__}, expected an object")
    return content


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors by name.

    Raises:
        ValueError: no such file, or one that is damaged.
    """
    return _tensors_and_ties(path)[0]


def _tensors_and_ties(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import safe_open

    if not path.is_file():
        raise ValueError(f"checkpoint {path.parent} has no {path.name}")
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            # safetensors.torch.save_model notes the names that it drops, each with the name it was tied to.
            ties = {k: v for k, v in (file.metadata() or {}).items() if v in tensors and k not in tensors}
    except Exception as error:  # a damaged file raises more than SafetensorError
        raise ValueError(f"checkpoint {path} cannot be read, it may be truncated: {error}") from error
    return tensors, ties


def _safetensors(path: Path) -> Contents:
    tensors, ties = _tensors_and_ties(path)
    return Contents(str(path), "safetensors", tied=ties).add(tensors)


def _looks_like_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size


def _sharded(path: Path, trusted: bool) -> Contents:
    shards = shards_of(path)
    contents = Contents(str(path), f"{len(shards)} shards")
    found: dict[str, Tensor] = {}
    for shard, names in shards.items():
        part = read(path.parent / shard, trusted)
        there = {entry.path: entry.tensor for entry in part.entries}
        missing = sorted(names - there.keys())
        if missing:
            raise ValueError(f"checkpoint {path.parent / shard} lacks {missing[:3]}, which {path.name} says it has")
        found.update({name: there[name] for name in names})
    return contents.add(found)


def shards_of(path: Path) -> dict[str, set[str]]:
    """The files that an index names, each with the names of its tensors.

    Raises:
        ValueError: no index, or one that leads out of its folder or to a file that is missing.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map or not _all_names(weight_map.values()):
        raise ValueError(f"checkpoint {path} has no 'weight_map' from names to files, so it is no index of shards")
    shards: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        shards.setdefault(shard, set()).add(name)
    for shard in shards:
        if Path(shard).name != shard or is_index(Path(shard)):
            raise ValueError(f"checkpoint {path} names the shard {shard!r}, expected a file beside it")
        if not (path.parent / shard).is_file():
            raise ValueError(f"checkpoint {path.parent} lacks the shard {shard}, which {path.name} names")
    return shards


def _all_names(values: Iterable[Any]) -> bool:
    return all(isinstance(value, str) and value for value in values)
