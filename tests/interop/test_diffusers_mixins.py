"""diffusers' own tests of models, run on ensembles. Its wheel has none: ``DIFFUSERS_SOURCE`` names a checkout."""

import importlib
import os
import sys
from pathlib import Path

import pytest

import fastens

SOURCE = os.environ.get("DIFFUSERS_SOURCE", "")
if not SOURCE or not (Path(SOURCE) / "tests" / "models" / "testing_utils").is_dir():
    pytest.skip("DIFFUSERS_SOURCE is no checkout of diffusers; make test-diffusers SOURCE=...", allow_module_level=True)
pytest.importorskip("accelerate", reason="tests of diffusers need accelerate")


def theirs(module: str):
    """A module of diffusers' tests, whose package is named as ours is."""
    ours = {name: each for name, each in sys.modules.items() if name.partition(".")[0] == "tests"}
    for name in ours:
        del sys.modules[name]
    sys.path.insert(0, SOURCE)
    config, pytest.mark._config = pytest.mark._config, None  # their marks are those of their conftest
    try:
        return importlib.import_module(f"tests.models.{module}")
    finally:
        pytest.mark._config = config
        sys.path.remove(SOURCE)
        for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
            del sys.modules[name]
        sys.modules.update(ours)


class OfEnsembles(type):
    """A class that makes ensembles of a model's class, and has whatever else that class has."""

    kind: type

    def __call__(cls, **config):
        return fastens.Ensemble([cls.kind(**config) for _ in range(2)])

    def __getattr__(cls, name):
        return getattr(cls.kind, name)


def ensembles(of: type) -> type:
    return OfEnsembles("Ensembles", (), {"kind": of, "from_pretrained": staticmethod(fastens.Ensemble.from_pretrained)})


def mixed(module: str, config: str) -> type:
    """The common tests of a model of diffusers, with ensembles of two in its place."""
    found = theirs(module)
    configured = getattr(found, config)
    of = configured().model_class
    common = theirs("testing_utils.common").ModelTesterMixin
    return type(config, (configured, common), {"model_class": ensembles(of)})


TestUNet = mixed("unets.test_models_unet_2d", "Unet2DModelTesterConfig")
TestDiT = mixed("transformers.test_models_dit_transformer2d", "DiTTransformer2DTesterConfig")
TestFlux = mixed("transformers.test_models_transformer_flux", "FluxTransformerTesterConfig")
