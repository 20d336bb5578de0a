"""k-diffusion over CompVis models: their network is ``apply_model(x, t, cond)``, and their forward a training loss."""

from typing import Any, cast

from torch import Tensor, nn

from fastens.dropout import MCDropout
from fastens.ensemble import Ensemble
from fastens.schedules import Prediction

_KINDS = {"eps": "epsilon", "x0": "x0", "v": "v"}  # of CompVis' configs

__all__ = ["CompVis", "CompVisEnsemble", "CompVisMCDropout", "ensemble_class"]


class CompVis(nn.Module):
    """A member whose call is ``apply_model`` of a CompVis latent diffusion model.

    Args:
        model: a module with ``apply_model(x, t, cond)`` and ``alphas_cumprod``.
    """

    inner_model: Any

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner_model = model

    def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Any:
        """Predict the noise of ``x`` [B, ...] at steps ``t`` [B]."""
        return self.inner_model.apply_model(x, t, cond)

    @property
    def alphas_cumprod(self) -> Tensor:
        """The schedule of the model."""
        return cast(Tensor, self.inner_model.alphas_cumprod)

    def apply_model(self, x: Tensor, t: Tensor, cond: Any = None) -> Any:
        """The call, by the name that ``CompVisDenoiser`` takes."""
        return self(x, t, cond)


class CompVisEnsemble(Ensemble):
    """An ensemble for ``k_diffusion.external.CompVisDenoiser``; see :class:`fastens.Ensemble`."""

    def apply_model(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate all members and aggregate."""
        return self(*args, **kwargs)

    def _first(self) -> Any:
        return self._engine.network if self._engine is not None else next(self.network.children())

    @property
    def _prediction(self) -> Prediction:
        said = getattr(self._first().inner_model, "parameterization", None)
        return super()._prediction.with_(
            Prediction(_KINDS.get(said or "")), "prediction=", f"parameterization {said!r}"
        )

    def _check_members(self) -> None:
        member = self._first()
        if not isinstance(member, CompVis):
            raise TypeError(
                f"members are {type(member).__name__}, whose network is apply_model and not their forward; wrap each: "
                "Ensemble([fastens.interop.k_diffusion.CompVis(model), ...])"
            )
        _ = self._prediction  # raises where the members contradict what was said


class CompVisMCDropout(MCDropout, CompVisEnsemble):
    """A CompVis model with K sets of dropout masks; see :class:`fastens.MCDropout`."""


def ensemble_class(member: nn.Module, kind: type[Ensemble]) -> type[Ensemble]:
    """The class of ensembles of members like this one."""
    return CompVisMCDropout if issubclass(kind, MCDropout) else CompVisEnsemble
