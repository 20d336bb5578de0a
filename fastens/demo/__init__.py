"""The demo: small U-Nets trained on real images that scikit-learn bundles, and samples of their ensembles.

The weights are in a package of their own, ``fastens-demo``, so that an installation that only serves is without them.
"""

from importlib.util import find_spec
from pathlib import Path

DATA = ("digits", "photographs")


def weights_folder() -> Path | None:
    """The folder of the shipped weights: of the checkout, or of the package ``fastens-demo``; none for neither."""
    checkout = Path(__file__).resolve().parents[2] / "demo" / "fastens_demo"
    if checkout.is_dir():
        return checkout
    spec = find_spec("fastens_demo")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def members_folder(data: str = "digits") -> Path:
    """The folder of the shipped members of "digits" or of "photographs".

    Raises:
        ModuleNotFoundError: the package with the weights is not installed.
    """
    folder = weights_folder()
    if folder is None:
        raise ModuleNotFoundError("the demo's weights are in fastens-demo, not installed: pip install 'fastens[demo]'")
    return folder / data


def member_paths(data: str = "digits") -> list[Path]:
    """The diffusers folders of the five members of "digits" or of "photographs"."""
    return sorted(path for path in members_folder(data).glob("member_*") if path.is_dir())


def dropout_path(data: str = "digits") -> Path | None:
    """The diffusers folder of a network that was trained with dropout; none where none ships for these images."""
    path = members_folder(f"{data}_dropout") / "member_0"
    return path if path.is_dir() else None
