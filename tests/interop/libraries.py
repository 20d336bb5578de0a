"""The libraries' own samplers, imported without the image and logging packages that their samplers never call."""

import importlib
import importlib.machinery
import sys
from unittest.mock import MagicMock

import pytest

# Imported by these libraries for images, FID, logging and optimal transport; taken only where they are not installed.
UNUSED = (
    "torchvision",
    "accelerate",
    "pytorch_fid",
    "skimage",
    "jsonmerge",
    "cleanfid",
    "clip",
    "ot",
    "wandb",
    "kornia",
    "torchaudio",
    "h5py",
    "natsort",
    "gdown",
    "datasets",
    "pytorch_warmup",
    "sentencepiece",
    "numba",
)


class StandIns:
    """Finds empty packages under the names above and theirs only."""

    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] in UNUSED else None

    def create_module(self, spec):
        module = MagicMock(name=spec.name)
        module.__path__, module.__spec__, module.__version__ = [], spec, "0"
        return module

    def exec_module(self, module):
        pass


def library(name):
    """Import a library, or skip with how to install it."""
    importlib.import_module("diffusers.models.unets.unet_2d")  # looks for some of them, and remembers what it found
    before = set(sys.modules)
    finder = StandIns()
    sys.meta_path.append(finder)  # last: packages that are installed win
    try:
        return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{error}; pip install --no-deps -r tests/interop/requirements.txt")
    finally:
        sys.meta_path.remove(finder)
        for stand_in in set(sys.modules) - before:
            if isinstance(sys.modules[stand_in], MagicMock):
                del sys.modules[stand_in]
