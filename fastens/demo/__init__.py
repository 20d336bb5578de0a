"""The demo: five small U-Nets trained on scikit-learn's digits, and the samples that their ensembles draw."""

from importlib.resources import files
from pathlib import Path


def member_paths() -> list[Path]:
    """The diffusers folders of the five members that ship with the package."""
    root = Path(str(files("fastens") / "demo" / "members"))
    return sorted(path for path in root.glob("member_*") if path.is_dir())
