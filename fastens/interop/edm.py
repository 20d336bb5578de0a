"""EDM (NVlabs/edm): denoisers net(x, sigma, class_labels) that name the noise levels they serve."""

from typing import Any

from torch import nn

from fastens import schedules
from fastens.dropout import MCDropout
from fastens.ensemble import Ensemble

__all__ = ["EDMEnsemble", "EDMMCDropout", "ensemble_class"]


class EDMEnsemble(Ensemble):
    """An ensemble of preconditioned denoisers; see :class:`fastens.Ensemble`.

    It serves the noise levels that every member serves. All members must be preconditioned alike: the average of
    denoisers in different parameterisations is no denoiser.
    """

    def _members_levels(self, name: str) -> list[Any]:
        members = list(self.network.children()) if self._engine is None else [self._engine.network]
        return [getattr(member, name) for member in members]

    @property
    def sigma_min(self) -> Any:
        """The lowest noise level that all members serve."""
        return max(self._members_levels("sigma_min"))

    @property
    def sigma_max(self) -> Any:
        """The highest noise level that all members serve."""
        return min(self._members_levels("sigma_max"))

    @property
    def _prediction(self) -> schedules.Prediction:
        # Their time is sigma and they give the data, whatever they were trained with.
        gives = schedules.Prediction("x0")
        return super()._prediction.with_(gives, "prediction=", "EDM's networks").filled(schedule=schedules.EDM())

    def _check_members(self) -> None:
        _ = self._prediction  # raises where the members contradict what was said
        if self._engine is not None:
            return
        first, *others = self.network.children()
        for k, other in enumerate(others, start=1):
            if type(other).__qualname__ != type(first).__qualname__:
                raise ValueError(
                    f"member {k} is preconditioned by {type(other).__name__}, but member 0 by {type(first).__name__}; "
                    "ensembles of EDM networks take one preconditioner"
                )
            data = [getattr(member, "sigma_data", None) for member in (first, other)]
            if data[0] != data[1]:
                raise ValueError(f"member {k} has sigma_data {data[1]}, but member 0 {data[0]}; expected one value")


class EDMMCDropout(MCDropout, EDMEnsemble):
    """An EDM denoiser with K sets of dropout masks; see :class:`fastens.MCDropout`."""


def ensemble_class(member: nn.Module, kind: type[Ensemble]) -> type[Ensemble]:
    """The class of ensembles of members like this one."""
    return EDMMCDropout if issubclass(kind, MCDropout) else EDMEnsemble
