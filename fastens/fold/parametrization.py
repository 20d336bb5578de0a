"""Folded parametrizations (``torch.nn.utils.parametrize``): a weight computed from other parameters."""

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from fastens.fold.looped import call_member, member_tensors
from fastens.fold.member_tensor import MemberTensor
from fastens.fold.registry import FoldedLayer, register_layer


class FoldedParametrization(FoldedLayer):
    """A parametrized tensor of all members: a function of parameters alone, computed for each and stacked."""

    def forward(self) -> Tensor | MemberTensor:
        """Evaluate each member's parametrization; one member's is a plain tensor, as its parameters are."""
        skeleton = self.skeleton[0]
        values = [call_member(skeleton, member_tensors(self, k), (), {}) for k in range(self.rows.num_members)]
        return values[0] if len(values) == 1 else MemberTensor(torch.stack(values), self.rows)


register_layer(parametrize.ParametrizationList, FoldedParametrization)
