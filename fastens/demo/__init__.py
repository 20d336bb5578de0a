"""The demo: small U-Nets trained on real images that scikit-learn bundles, and samples of their ensembles."""

from importlib.resources import files
from pathlib import Path

FOLDERS = {"digits": "members", "photographs": "photograph_members"}
DROPOUT_FOLDERS = {"digits": "dropout_member"}


def members_folder(data: str = "digits") -> Path:
    """The folder of the members that ship with the package: of "digits" or of "photographs"."""
    return Path(str(files("fastens") / "demo" / FOLDERS[data]))


def member_paths(data: str = "digits") -> list[Path]:
    """The diffusers folders of the five members of "digits" or of "photographs"."""
    return sorted(path for path in members_folder(data).glob("member_*") if path.is_dir())


def dropout_path(data: str = "digits") -> Path | None:
    """The diffusers folder of a network that was trained with dropout; none where none ships for these images."""
    name = DROPOUT_FOLDERS.get(data)
    return None if name is None else Path(str(files("fastens") / "demo" / name / "member_0"))
