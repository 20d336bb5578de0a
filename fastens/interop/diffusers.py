"""diffusers: an ensemble of its models is a ``ModelMixin``, so that pipelines move, save and reload it."""

from pathlib import Path
from typing import Any

from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from fastens.dropout import MCDropout
from fastens.ensemble import Ensemble

__all__ = ["DiffusersEnsemble", "DiffusersMCDropout", "ModelMixin", "ensemble_class"]


class DiffusersEnsemble(Ensemble, ModelMixin):  # pyright: ignore[reportIncompatibleMethodOverride]
    """An ensemble of diffusers models. Its ``config`` is the members'; see :class:`fastens.Ensemble`."""

    __module__ = "fastens"  # where a saved pipeline looks for the class

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, directory: str | Path, factory: Any = None, **options: Any
    ) -> Ensemble:
        """Read a saved ensemble; takes the keywords with which a pipeline loads its parts (``torch_dtype``, ...)."""
        return Ensemble.from_pretrained(directory, factory, **options)


class DiffusersMCDropout(MCDropout, DiffusersEnsemble):  # pyright: ignore[reportIncompatibleMethodOverride]
    """A diffusers model with K sets of dropout masks; see :class:`fastens.MCDropout`."""

    __module__ = "fastens"


def ensemble_class(member: nn.Module, kind: type[Ensemble]) -> type[Ensemble]:
    """The class of ensembles of members like this one."""
    if not isinstance(member, ModelMixin):
        return kind
    return DiffusersMCDropout if issubclass(kind, MCDropout) else DiffusersEnsemble
