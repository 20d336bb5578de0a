"""The files that the stacks of a saved ensemble are in: one or several shards, of a variant or of none."""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from fastens.io import containers

# Of ensembles of diffusers models, as diffusers names files, so that its pipelines and the hub find them; of others.
DIFFUSERS, OTHERS = "diffusion_pytorch_model", "ensemble"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class NoStacks(FileNotFoundError, ValueError):
    """A folder that lacks the file of an ensemble's stacks."""


def checked_variant(variant: str | None) -> str | None:
    """A variant that can be a part of a file's name.

    Raises:
        ValueError: it cannot.
    """
    if variant is not None and not (isinstance(variant, str) and re.fullmatch(r"\w[\w-]*", variant)):
        raise ValueError(f"variant is {variant!r}, expected a word such as 'fp16', as a part of a file's name")
    return variant


def file_name(base: str, variant: str | None) -> str:
    """The name of the file that holds all stacks."""
    return ".".join(part for part in (base, variant, "safetensors") if part)


def index_name(base: str, variant: str | None) -> str:
    """The name of the file that says which shard holds which stack."""
    return ".".join(part for part in (base, "safetensors.index", variant, "json") if part)


def split(
    tensors: dict[str, Tensor], base: str, variant: str | None, max_shard_size: int | str | None
) -> dict[str, dict[str, Tensor]]:
    """The files that stacks are written to, each with its stacks, none larger than asked unless it holds a single one.

    Raises:
        ValueError: a size that is none.
    """
    limit = _limit(max_shard_size)
    groups: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if groups[-1] and size + tensor.nbytes > limit:
            groups.append({})
            size = 0
        groups[-1][name] = tensor
        size += tensor.nbytes
    whole = file_name(base, variant)
    if len(groups) == 1:
        return {whole: groups[0]}
    stem = whole.removesuffix(".safetensors")
    return {f"{stem}-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, 1)}


def _limit(size: int | str | None) -> float:
    if size is None:
        return float("inf")
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?B|)", str(size).strip().upper())
    if match is None or match[2] not in _UNITS or float(match[1]) <= 0:
        raise ValueError(f"max_shard_size is {size!r}, expected a number of bytes, or a size such as '5GB'")
    return float(match[1]) * _UNITS[match[2]]


def remove_others(folder: Path, kept: set[str], variant: str | None) -> None:
    """Remove the files of an earlier save of this variant, under which a later reader would find older stacks."""
    middle = f"\\.{re.escape(variant)}" if variant else ""
    pattern = rf"({DIFFUSERS}|{OTHERS}){middle}(-\d{{5}}-of-\d{{5}})?\.safetensors"
    indices = {index_name(base, variant) for base in (DIFFUSERS, OTHERS)}
    for path in list(folder.iterdir()):
        if path.name not in kept and (path.name in indices or re.fullmatch(pattern, path.name)):
            path.unlink()


def read(folder: Path, base: str, variant: str | None) -> dict[str, Tensor]:
    """The stacks by name.

    Raises:
        NoStacks: there is no such file.
        ValueError: it is damaged, or there are two.
    """
    names = [make(each, variant) for each in (DIFFUSERS, OTHERS) for make in (file_name, index_name)]
    found = [folder / name for name in names if (folder / name).is_file()]
    if not found:
        stems = (path.name.removesuffix(".safetensors").partition(".") for path in folder.glob("*.safetensors"))
        others = sorted({rest.partition("-")[0] for stem, _, rest in stems if stem in (DIFFUSERS, OTHERS) and rest})
        there = f"; it has the variants {others}, say one by variant=" if others else ""
        # diffusers says so of its models, and those who look for variants read it
        said = f"Error no file named {DIFFUSERS}.bin found in directory {folder}: " if base == DIFFUSERS else ""
        raise NoStacks(f"{said}checkpoint {folder} has no {file_name(base, variant)}{there}")
    if len(found) > 1:
        raise ValueError(
            f"checkpoint {folder} has {found[0].name} and {found[1].name}, of which one is of an earlier save that was "
            "interrupted: remove it, or save the ensemble again"
        )
    if containers.is_index(found[0]):
        return {entry.path: entry.tensor for entry in containers.read(found[0]).entries}
    return containers.read_safetensors(found[0])
