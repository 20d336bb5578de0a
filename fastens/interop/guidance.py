"""A guider of diffusers' modular pipelines that evaluates an ensemble's two branches in one folded pass."""

from __future__ import annotations

import threading
from typing import Any

import torch
import torch.utils._pytree as pytree
from diffusers.configuration_utils import register_to_config
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput
from torch import Tensor

from fastens.composition.branches import ORDERS, Branches
from fastens.ensemble import Ensemble

__all__ = ["EnsembleGuidance"]


class EnsembleGuidance(BaseGuidance):
    """Classifier-free guidance of an ensemble: what ``ClassifierFreeGuidance`` gives, in one call of 2 B rows.

    The pipeline sees one branch, the conditional one. While it calls its ensemble for it, every argument that is one of
    the branch's inputs has the unconditional input's rows beside its own.

    Args:
        guidance_scale: ``uncond + guidance_scale (cond - uncond)``.
        order: ``"after"`` the ensemble's rule, as with diffusers' guider, or ``"before"`` it, see
            :func:`fastens.composition.compose`.
        start: share of the steps after which guidance begins.
        stop: share of the steps after which it ends.
        enabled: whether there is any.

    Raises:
        ValueError: another order, shares out of range.
    """

    _input_predictions = ["pred_cond"]  # noqa: RUF012 - diffusers' check asks for a list

    @register_to_config
    def __init__(
        self,
        guidance_scale: float = 7.5,
        order: str = "after",
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ) -> None:
        super().__init__(start, stop, enabled)
        if order not in ORDERS:
            raise ValueError(f"order {order!r} is unknown, expected one of {', '.join(map(repr, ORDERS))}")
        self.guidance_scale, self.order = guidance_scale, order
        self._branches: dict[int, Branches] = {}  # by ensemble: it has found out which calls can stand side by side
        self._pairs: list[tuple[Any, Any]] = []

    @property
    def is_conditional(self) -> bool:
        """Whether the branch in progress has the condition: there is no other."""
        return True

    @property
    def num_conditions(self) -> int:
        """How many branches the pipeline calls its model for: one, since the composition evaluates the others."""
        return 1

    @property
    def _guides(self) -> bool:
        if not self._enabled or self.guidance_scale == 1 or not self._pairs:
            return False
        steps = self._num_inference_steps
        if steps is None:
            return True
        step: Any = self._step
        return int(self._start * steps) <= step < int(self._stop * steps)

    def prepare_inputs(self, data: Any) -> list[Any]:
        """Keep both branches' inputs, and give the conditional ones."""
        values = data.values()
        self._pairs = [v for v in values if isinstance(v, tuple) and v[0] is not None and v[1] is not None]
        return [self._prepare_batch(data, 0, "pred_cond")]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: Any) -> list[Any]:
        """The same, of fields of a block's state."""
        names = [v for v in input_fields.values() if isinstance(v, tuple) and None not in v]
        pairs = [(getattr(data, first, None), getattr(data, second, None)) for first, second in names]
        self._pairs = [pair for pair in pairs if pair[0] is not None and pair[1] is not None]
        return [self._prepare_batch_from_block_state(input_fields, data, 0, "pred_cond")]

    def prepare_models(self, denoiser: torch.nn.Module) -> None:
        """Let the ensemble's next call be of both branches, until :meth:`cleanup_models`.

        Raises:
            TypeError: no ensemble.
            RuntimeError: another guider has it.
        """
        super().prepare_models(denoiser)
        if not self._guides:
            return
        if not isinstance(denoiser, Ensemble):
            raise TypeError(
                f"EnsembleGuidance: the model is a {type(denoiser).__name__}, expected a fastens.Ensemble; other "
                "models take diffusers.ClassifierFreeGuidance"
            )
        if "forward" in denoiser.__dict__:
            raise RuntimeError(
                "EnsembleGuidance: another guider, or VarianceMaps, watches the calls of this ensemble; give each "
                "pipeline a view of its own, ens.with_rule(ens.rule)"
            )
        branches = self._branches.setdefault(id(denoiser), Branches(denoiser, self.order, together=True))
        thread, plain = threading.get_ident(), type(denoiser).forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != thread:
                return plain(denoiser, *args, **kwargs)
            del denoiser.__dict__["forward"]  # what is called below is the ensemble itself
            try:
                return self._called(branches, args, kwargs)
            finally:
                denoiser.__dict__["forward"] = forward

        denoiser.__dict__["forward"] = forward

    def cleanup_models(self, denoiser: torch.nn.Module) -> None:
        """Leave the ensemble as it was."""
        denoiser.__dict__.pop("forward", None) if self._guides else None

    def _called(self, branches: Branches, args: Any, kwargs: Any) -> Any:
        found = [False] * len(self._pairs)

        def unconditional(leaf: Any) -> Any:
            for i, (condition, other) in enumerate(self._pairs):
                if _is(leaf, condition):
                    found[i] = True
                    return other.to(leaf.device, leaf.dtype) if isinstance(other, Tensor) else other
            return leaf

        call = (args, kwargs)
        other = pytree.tree_map(unconditional, call)
        if not any(found):
            raise ValueError(
                "EnsembleGuidance: none of the guider's inputs is among the arguments of the ensemble, so there is no "
                "unconditional branch; members must be conditional"
            )
        return branches(call, [(self.guidance_scale - 1, other)])

    def forward(self, pred_cond: Any) -> GuiderOutput:
        """What the pipeline steps by: it is guided already."""
        return GuiderOutput(pred=pred_cond, pred_cond=pred_cond, pred_uncond=None)


def _is(leaf: Any, condition: Any) -> bool:
    """Whether an argument is an input, as it is or moved to another dtype or device."""
    if leaf is condition or not isinstance(leaf, Tensor) or not isinstance(condition, Tensor):
        return leaf is condition
    return leaf.shape == condition.shape and torch.equal(leaf, condition.to(leaf.device, leaf.dtype))
