"""MC Dropout: one network as an ensemble of its dropout masks (Gal and Ghahramani, arXiv 1506.02142)."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from fastens import rules
from fastens.engine.kinds import MemberKind
from fastens.engine.masked import Masked
from fastens.engine.masks import Masks
from fastens.ensemble import Ensemble
from fastens.network.gradients import warn_of_hooks
from fastens.network.overlaps import overlapping, trained_together
from fastens.network.stacking import Placement, Stacked, check_apart, make_skeleton, tensors_of
from fastens.pickled import KINDS
from fastens.settings import check_settings


class MCDropout(Ensemble):
    """One network with K sets of dropout masks, called like the network: every evaluation applies dropout.

    The weights are held once; a pass runs the network on K copies of the batch, each row under its member's mask. Masks
    are counter-based: the same on every device, whatever the batch. Neither ``train`` nor ``eval`` changes what is
    computed: the network runs in evaluation mode, and its dropouts (layers, functions, attention) drop.

    Args:
        model: the network; left as it is.
        num_members: K, the number of masks.
        rule: as for :class:`fastens.Ensemble`.
        masks: ``"fixed"``: member k's masks depend on seed, member and layer only, so that each member is one network;
            ``"fresh"``: they are drawn anew for each sample at each evaluation, and the rows of one guided sample share
            them.
        p: the probability for all dropouts, for networks that were built with p = 0; none for their own. Attention
            weights are dropped where the network itself does.
        seed: of the masks.
        engine: as for :class:`fastens.Ensemble`, as are backend, max_fold, prediction, aggregate_in and schedule.
        backend: see there.
        max_fold: see there.
        prediction: see there.
        aggregate_in: see there.
        schedule: see there.
        device: where the weights are copied to; none for where they are.
        dtype: of floating-point tensors; none for their own.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: no members, p outside [0, 1), an unknown kind of masks; parameters that share memory and are
            trained; a network that holds an ensemble; at the first call: a network that drops nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        num_members: int,
        rule: str | rules.Rule = "mean",
        *,
        masks: str = "fixed",
        p: float | None = None,
        seed: int = 0,
        engine: str = "auto",
        backend: str = "auto",
        max_fold: int | None = None,
        prediction: str | None = None,
        aggregate_in: str | None = None,
        schedule: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
        if num_members < 1:
            raise ValueError(f"num_members is {num_members}, expected at least one set of masks")
        if masks not in ("fixed", "fresh"):
            raise ValueError(f"masks {masks!r} is unknown, expected 'fixed' or 'fresh'")
        if p is not None and not 0 < p < 1:
            raise ValueError(f"p is {p}, expected a probability above 0 and below 1, or none for the network's own")
        place = Placement.of(device, dtype)
        settings = check_settings(engine, backend, max_fold, prediction, aggregate_in, schedule)
        self._setup(num_members, rule, {**settings, "masks": masks, "p": p, "seed": seed})
        warn_of_hooks([model])
        if (pair := trained_together(model)) is not None:
            raise ValueError(
                f"{' and '.join(pair)} share memory in the model and are trained, which copies of them would not: tie "
                "them as one parameter, as `second.weight = first.weight`, or freeze them by requires_grad_(False)"
            )
        check_apart(model)
        stacks = {name: _copied(t, place) for name, t in tensors_of(model).items()}
        self._adopt(Stacked(make_skeleton(model), stacks, frozenset(stacks), overlapping([model])))

    @classmethod
    def _kind(cls) -> type[Ensemble]:
        return MCDropout

    def _kind_of_members(self, skeleton: nn.Module) -> MemberKind:
        settings = self._settings
        skeleton.eval()
        recurrent = [path for path, m in skeleton.named_modules() if isinstance(m, nn.RNNBase) and m.dropout > 0]
        if recurrent:
            warnings.warn(
                f"fastens: the dropout between the layers of {', '.join(recurrent)} is inside a recurrent kernel and "
                "has no masks; it stays off",
                stacklevel=4,
            )
        return Masked(Masks(self.num_members, settings["seed"], settings["masks"] == "fresh", settings["p"]))

    def train(self, mode: bool = True) -> "MCDropout":
        """Keep the mode for callers that read it; the network stays in evaluation mode, with dropout on."""
        self._views.train(mode)
        return self


def _copied(tensor: Tensor, place: Placement) -> Tensor:
    clone = tensor.detach().to(**place.like(tensor), copy=True)
    return nn.Parameter(clone, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else clone


KINDS[True] = MCDropout
