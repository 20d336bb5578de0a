"""diffusers: an ensemble of its models is a ``ModelMixin``, so that pipelines move, save and reload it."""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from fastens.aggregation import applied_in
from fastens.dropout import MCDropout
from fastens.ensemble import Ensemble
from fastens.methods import change_members
from fastens.schedules import Flow, Prediction

# Flow networks that pipelines call with the scheduler's own timesteps, and whose output goes to its step as it is.
# Others are called with sigma or 1 - sigma, some give the velocity's negative, and none of that is in a config.
_AS_SCHEDULED = """SD3Transformer2DModel WanTransformer3DModel HunyuanVideoTransformer3DModel MochiTransformer3DModel
    LTXVideoTransformer3DModel CogView4Transformer2DModel SkyReelsV2Transformer3DModel""".split()

# What pipelines call at every step and at their end, and what it gives where no hook listens.
_TOLD_TO_HOOKS: dict[str, Callable[[], Any]] = {"cache_context": nullcontext, "_reset_stateful_cache": lambda: None}

__all__ = ["DiffusersEnsemble", "DiffusersMCDropout", "ModelMixin", "VarianceMaps", "ensemble_class"]


class DiffusersEnsemble(Ensemble, ModelMixin):  # pyright: ignore[reportIncompatibleMethodOverride, reportIncompatibleVariableOverride]  # ensembles' go first
    """An ensemble of diffusers models. Its ``config`` is the members'; see :class:`fastens.Ensemble`."""

    __module__ = "fastens"  # where a saved pipeline looks for the class

    def _check_members(self) -> None:
        super()._check_members()
        self._check_times()

    def _aggregation(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._check_times()  # the rule may be another one by now
        return super()._aggregation(args, kwargs)

    def _check_times(self) -> None:
        """Raise where the schedule is to be read at the network's times, and what those are is not known."""
        said = self._prediction
        target = applied_in(self.rule, said, self._settings["aggregate_in"])
        if target not in (None, said.kind) or self.rule.needs_noise_level:
            member = next(self.network.children()) if self._engine is None else self._engine.skeleton
            check_flow_network(type(member).__name__, said)

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        return functools.partial(_told, self, name, found) if name in _TOLD_TO_HOOKS else found

    def enable_layerwise_casting(self, *args: Any, **kwargs: Any) -> None:
        """Keep the weights of every member in another dtype than it computes in, by hooks: members are looped then."""
        change_members(self, "enable_layerwise_casting", *args, **kwargs)

    def enable_group_offload(self, *args: Any, **kwargs: Any) -> None:
        """Move groups of every member's modules where they are needed, by hooks: members are looped then."""
        change_members(self, "enable_group_offload", *args, **kwargs)

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]  # diffusers' own signature, with K folders
        cls, directory: str | Path, factory: Any = None, **options: Any
    ) -> Ensemble:
        """Read a saved ensemble; takes the keywords with which a pipeline loads its parts (``torch_dtype``, ...)."""
        return Ensemble.from_pretrained(directory, factory, **options)


def _told(ensemble: Ensemble, name: str, tell: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Tell the members' hooks, where there are any: nothing else changes, so that plans stay."""
    hooks = (getattr(module, "_diffusers_hook", None) for module in ensemble.network.modules())
    return tell(*args, **kwargs) if any(hook is not None and hook.hooks for hook in hooks) else _TOLD_TO_HOOKS[name]()


def check_flow_network(name: str, said: Prediction) -> None:
    """Raise ValueError unless a network is known to take a flow scheduler's timesteps and to give its velocity.

    Args:
        name: of the network's class.
        said: what was said of it.
    """
    known = name.startswith("UNet") or name in _AS_SCHEDULED
    if isinstance(said.schedule, Flow) and said.source is not None and not known:
        raise ValueError(
            f"members are {name}, and the schedule is from {said.source}: whether their pipeline calls them with its "
            "timesteps, with sigma or with 1 - sigma, and whether their output is the velocity, is not known here; "
            f"say schedule=fastens.schedules.Flow(...): time_scale={said.schedule.time_scale:g} for timesteps, 1 for "
            "sigma, data_at=1 for 1 - sigma"
        )


class DiffusersMCDropout(MCDropout, DiffusersEnsemble):
    """A diffusers model with K sets of dropout masks; see :class:`fastens.MCDropout`."""

    __module__ = "fastens"


class VarianceMaps:
    """The variance over members at every step of a pipeline, from the pass that the pipeline makes anyway.

    ``with VarianceMaps(ens) as maps: pipe(..., callback_on_step_end=maps)``. Pipelines without callbacks leave the
    argument out; then every evaluation is a step. With guidance say ``blocks=2``: the variance is then that of the
    batch's first block, the unconditional one in diffusers' pipelines, unless ``block`` says another.

    Args:
        ensemble: with a rule that evaluates all members.
        block: which of the batch's equal blocks is kept, of ``blocks``.
        blocks: how often guidance repeats the batch.

    Attributes:
        steps: one tensor [B, C, H, W] on the CPU per step; of a step's evaluations the last.
    """

    def __init__(self, ensemble: Ensemble, block: int = 0, blocks: int = 1) -> None:
        if not 0 <= block < blocks:
            raise ValueError(f"block {block} of {blocks}: expected one of 0 to {blocks - 1}")
        self.steps: list[Tensor] = []
        self._ensemble = ensemble
        self._block, self._blocks = block, blocks
        self._callbacks = 0

    def __enter__(self) -> "VarianceMaps":
        self._ensemble.__dict__["forward"] = (
            self._forward
        )  # before the class's: the pipeline calls the ensemble as ever
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._ensemble.__dict__["forward"]

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        output, variance = self._ensemble.forward_with_variance(*args, **kwargs)
        while not isinstance(variance, Tensor):
            variance = variance[0]
        if variance.shape[0] % self._blocks:
            raise ValueError(f"the batch has {variance.shape[0]} rows, expected a multiple of blocks={self._blocks}")
        kept = variance.detach().chunk(self._blocks)[self._block].to("cpu", torch.float32)
        if self._callbacks and len(self.steps) > self._callbacks:
            self.steps[-1] = kept  # a further evaluation of the step in progress
        else:
            self.steps.append(kept)
        return output

    def __call__(self, pipeline: Any, step: int, timestep: Any, callback_kwargs: dict[str, Any]) -> dict[str, Any]:
        """End a step: diffusers' ``callback_on_step_end``."""
        self._callbacks += 1
        del self.steps[: len(self.steps) - self._callbacks]  # earlier evaluations of the first step
        return callback_kwargs


def ensemble_class(member: nn.Module, kind: type[Ensemble]) -> type[Ensemble]:
    """The class of ensembles of members like this one."""
    if not isinstance(member, ModelMixin):
        return kind
    return DiffusersMCDropout if issubclass(kind, MCDropout) else DiffusersEnsemble
