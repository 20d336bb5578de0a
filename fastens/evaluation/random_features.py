"""A feature network that needs no file: random convolutions, for small images that Inception was not made for."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

WIDTH = 32


class RandomFeatures(nn.Module):
    """Three convolutions with random weights, and the mean of their outputs over the image.

    Distances between such features compare samples where no trained network fits the data (Naeem et al., "Reliable
    fidelity and diversity metrics for generative models", ICML 2020). A seed gives the same network everywhere.

    Args:
        channels: of the images.
        seed: of the weights.
    """

    def __init__(self, channels: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise((channels, WIDTH, 2 * WIDTH, WIDTH)):
            layer = nn.Conv2d(inputs, outputs, 3, 2 if layers else 1, 1)
            nn.init.normal_(layer.weight, std=(2 / (9 * inputs)) ** 0.5, generator=generator)
            assert layer.bias is not None
            nn.init.normal_(layer.bias, std=0.1, generator=generator)
            layers += [layer, nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, 32] of images [B, C, H, W] in [-1, 1]."""
        return self.layers(x.float().cpu()).mean((2, 3))
