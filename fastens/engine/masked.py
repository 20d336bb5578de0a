"""Members that are dropout masks on one set of weights, as MC Dropout has them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.utils._pytree as pytree
from torch import Tensor, nn

from fastens.engine.arguments import Arguments
from fastens.engine.kinds import MemberKind
from fastens.engine.leaves import unwrapped
from fastens.engine.masks import MaskPass, Masks
from fastens.fold.dispatch import Fold, inside
from fastens.fold.tensor import Hidden, one_member

if TYPE_CHECKING:
    from fastens.engine.folding import FoldedMembers


class Masked(MemberKind):
    """Members that share all weights, and differ in the masks of the network's dropouts.

    Args:
        masks: of the ensemble.
    """

    own_weights = False
    runs_alone = False
    by_sample = True
    wrapped = True
    mode = False
    drawn_anew = "fresh dropout masks are drawn", "use masks='fixed'"

    def __init__(self, masks: Masks) -> None:
        self.masks = masks
        self.fresh = masks.fresh

    def bind(self, network: nn.Module) -> None:
        """Drop the masks that were kept."""
        self.masks.forget()

    def handed_out(self, member: nn.Module, k: int) -> nn.Module:
        """A module that always applies member k's masks."""
        return MaskedMember(member, self.masks, k)

    def call(self, engine: FoldedMembers, member: nn.Module, k: int, arguments: Arguments, method: str) -> Any:
        """What a module gives under member k's masks, in a pass of one member."""
        hidden, arguments = one_member(engine.num_members, k), arguments.copied()
        output = engine.run(engine.new_pass(hidden, arguments), arguments, method, network=member)
        return pytree.tree_map(lambda x: unwrapped(x, hidden)[0], output)

    def network_of(self, hidden: Hidden, network: nn.Module) -> nn.Module | None:
        """None in a pass of one member, which runs that member's module."""
        return None if hidden.size == 1 else network

    def dropouts(self, hidden: Hidden, arguments: Arguments, samples: Tensor | None = None) -> MaskPass:
        """The masks of the members of this pass, and of this evaluation where masks are fresh."""
        members, of_rows = self.masks.layout(hidden, arguments)
        return MaskPass(self.masks, members, of_rows if samples is None else samples, *arguments.evaluation)


class MaskedMember(nn.Module):
    """A network that always applies the masks of one member.

    Args:
        network: the network, with weights of its own.
        masks: of the ensemble.
        k: the member.
    """

    def __init__(self, network: nn.Module, masks: Masks, k: int) -> None:
        super().__init__()
        self.network = network
        self.member = k
        self.masks = Masks(masks.num_members, masks.seed, masks.fresh, masks.p)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network with the member's masks."""
        arguments, hidden = Arguments(args, kwargs).copied(), one_member(self.masks.num_members, self.member)
        dropouts = MaskPass(self.masks, *self.masks.layout(hidden, arguments))
        dropouts.runs(self.network)
        fold = Fold(hidden, wrapped=True, dropouts=dropouts)
        bound, named = arguments.bound(fold)
        with inside(fold):
            output = self.network(*bound, **named)
        return pytree.tree_map(lambda x: unwrapped(x, hidden)[0], output)
