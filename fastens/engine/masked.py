"""One member of an MC Dropout ensemble as a module of its own."""

from typing import Any

import torch.utils._pytree as pytree
from torch import nn

from fastens.engine.arguments import Arguments
from fastens.engine.leaves import unwrapped
from fastens.engine.masks import MaskPass, Masks
from fastens.fold.dispatch import Fold, inside
from fastens.fold.tensor import one_member


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
        self.masks.bind(network)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network with the member's masks."""
        arguments, hidden = Arguments(args, kwargs).copied(), one_member(self.masks.num_members, self.member)
        self.masks.know(self.network)
        masks = MaskPass(self.masks, *self.masks.layout(hidden, arguments))
        fold = Fold(hidden, wrapped=True, masks=masks)
        bound, named = arguments.bound(fold)
        with inside(fold):
            output = self.network(*bound, **named)
        return pytree.tree_map(lambda x: unwrapped(x, hidden)[0], output)
