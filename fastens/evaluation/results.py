"""Results on disk, found again by what they were computed from."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from fastens.draws import Assignment, assigned_to
from fastens.evaluation.denoiser import Denoiser
from fastens.evaluation.identity import fingerprint
from fastens.files import whole


class Parts:
    """Arrays computed part by part, kept in a folder so that an interrupted run goes on where it stopped.

    Args:
        folder: where the parts are kept; none keeps nothing.
        key: from :func:`fastens.evaluation.identity.fingerprint`; parts of another key are not read.
    """

    def __init__(self, folder: Path | None, key: str) -> None:
        self._folder = None if folder is None else Path(folder) / key

    @classmethod
    def of(cls, folder: Path | None, denoiser: Denoiser, **others: Any) -> "Parts":
        """The parts of what a denoiser gives, by all that this depends on, and by what else decides the result."""
        if folder is None:
            return cls(None, "")
        assigned = assigned_to(denoiser.model)
        rows = (assigned.members, assigned.guidance) if isinstance(assigned, Assignment) else None
        said = (denoiser.prediction, denoiser.conditioning)
        return cls(folder, fingerprint(model=denoiser.model, said=said, assigned=rows, **others))

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
