"""Names of the Hugging Face hub, as far as they are in its cache on this machine; nothing is downloaded."""

from __future__ import annotations

import re
from pathlib import Path

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILES = {".bin", ".ckpt", ".npz", ".pkl", ".pt", ".pth", ".safetensors"}


def cached(path: Path) -> Path | None:
    """Return the cache folder of a hub id such as ``google/ddpm-cifar10-32``, None for what is no id.

    Raises:
        FileNotFoundError: it looks like an id, and neither a path of that name nor the cache has it.
    """
    name = path.as_posix()
    if path.exists() or not _ID.fullmatch(name) or path.suffix in _FILES:
        return None
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        return None
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"checkpoint {name} does not exist. As an id of the Hugging Face hub it is not in this machine's cache: "
            f"fetch it first, by `hf download {name}`, and pass the id again, or the folder that this prints"
        ) from error
