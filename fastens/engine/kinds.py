"""What the members of an ensemble have for themselves: the interface of every kind, and the plain one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastens import reproducible
from fastens.engine.arguments import Arguments
from fastens.engine.entering import call
from fastens.fold.dropouts import BY_TORCH, Dropouts
from fastens.fold.stand_ins import traced
from fastens.fold.tensor import Hidden
from fastens.network.member_tables import called

if TYPE_CHECKING:
    from fastens.engine.folding import FoldedMembers


class MemberKind:
    """Members with weights of their own, each a network that runs without the others: what other kinds differ from.

    Attributes:
        own_weights: whether each member has weights of its own; else all tensors are held once.
        runs_alone: whether a member is called as the module that it is; else the fold runs it, as a pass of one.
        by_sample: whether what a member gives for a row depends on which sample that is.
        wrapped: whether values that are common when a pass begins may become member-valued in place.
        fresh: whether every evaluation draws numbers of its own.
        drawn_anew: what these are, and what to do where that cannot be.
        mode: the mode that members always run in; none for that of the ensemble.
    """

    own_weights = True
    runs_alone = True
    by_sample = False
    wrapped = False
    fresh = False
    drawn_anew = "nothing is drawn", ""
    mode: bool | None = None

    def bind(self, network: nn.Module) -> None:
        """Look at the network of all members, whose modules or weights are others now."""

    def handed_out(self, member: nn.Module, k: int) -> nn.Module:
        """Member k as the user gets it, given a module with copies of its tensors."""
        return member

    def call(self, engine: FoldedMembers, member: nn.Module, k: int, arguments: Arguments, method: str) -> Any:
        """What a module that is member k returns, of plain tensors."""
        kind, writes = None, engine.guards.barrier.writes
        # other methods lead to code that nobody has looked at, and traced shapes may be of no number
        if method == "forward" and not (reproducible.enabled() or traced(*arguments.tensors)):
            modes = member.training, torch.is_grad_enabled(), torch.is_inference_mode_enabled()
            kind = k, modes, writes, *((x.shape, x.dtype) for x in arguments.tensors)
        with called(), engine.questions.answered(member, writes, kind):
            return call(member, method, *arguments.of_member(k))

    def network_of(self, hidden: Hidden, network: nn.Module) -> nn.Module | None:
        """The network whose own tables a pass looks at; none where it runs one member's module."""
        return network

    def dropouts(self, hidden: Hidden, arguments: Arguments, samples: Tensor | None = None) -> Dropouts:
        """What the dropouts of a pass drop; ``samples``, int64 [R], are those of its rows where a plan has them."""
        return BY_TORCH


PLAIN = MemberKind()
