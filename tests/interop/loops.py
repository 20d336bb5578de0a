"""What a user would write without the ensemble: the members one by one, then the mean."""

import torch
from torch import nn


class Looped(nn.Module):
    def __init__(self, members):
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, *args, **kwargs):
        return torch.stack([member(*args, **kwargs) for member in self.members]).mean(0)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.members[0], name)
