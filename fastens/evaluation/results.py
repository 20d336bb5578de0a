"""Results on disk, found again by what they were computed from."""

import hashlib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from fastens.ensemble import Ensemble
from fastens.files import whole
from fastens.internal import settings_of

_SPEED = ("engine", "backend", "max_fold")  # settings of an ensemble that do not change what it computes


def fingerprint(**parts: Any) -> str:
    """A short digest of tensors, modules' weights and JSON-able values: equal parts, equal digest."""
    digest = hashlib.sha256()
    for name, part in sorted(parts.items()):
        digest.update(name.encode())
        if isinstance(part, nn.Module):
            if isinstance(part, Ensemble):  # the same weights under other masks, or in another parameterisation
                kept = {name: value for name, value in settings_of(part).items() if name not in _SPEED}
                digest.update(json.dumps(kept, sort_keys=True, default=repr).encode())
            for key, tensor in part.state_dict().items():
                digest.update(key.encode())
                digest.update(_bytes(tensor))
        elif isinstance(part, Tensor):
            digest.update(str(tuple(part.shape)).encode())
            digest.update(_bytes(part))
        else:
            digest.update(json.dumps(part, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def _bytes(tensor: Any) -> bytes:
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # of an ensemble over a mesh
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


class Parts:
    """Arrays computed part by part, kept in a folder so that an interrupted run goes on where it stopped.

    Args:
        folder: where the parts are kept; none keeps nothing.
        key: from :func:`fingerprint`; parts of another key are not read.
    """

    def __init__(self, folder: Path | None, key: str) -> None:
        self._folder = None if folder is None else Path(folder) / key

    def read(self, name: str) -> dict[str, np.ndarray] | None:
        """The arrays of a part, or none if it is not there whole."""
        if self._folder is None:
            return None
        try:
            with np.load(self._folder / f"{name}.npz", allow_pickle=False) as file:
                return {key: file[key] for key in file.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            return None

    def write(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep the arrays of a part."""
        if self._folder is None:
            return
        with whole(self._folder / f"{name}.npz") as (partial,):
            np.savez(partial, **cast(dict[str, Any], arrays))
