"""A small classifier, whose last features judge samples where Inception's have no meaning (8x8 digits)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastens.modes import evaluating

FEATURES = 32


class Classifier(nn.Module):
    """Two convolutions and two linear layers.

    Args:
        channels: of the images.
        size: height and width of the images.
        classes: how many.
    """

    def __init__(self, channels: int, size: int, classes: int) -> None:
        super().__init__()
        half = -(-size // 2)
        self.features = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 48, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(48 * half * half, FEATURES),
            nn.BatchNorm1d(FEATURES, affine=False),  # each feature of unit variance, so that distances have a scale
        )
        self.head = nn.Linear(FEATURES, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, C, H, W]."""
        return self.head(self.features(x).relu())


def train_classifier(images: Tensor, labels: Tensor, *, epochs: int = 20, seed: int = 0) -> Classifier:
    """Train a classifier; the same seed gives the same one.

    Args:
        images: [N, C, H, W].
        labels: [N], classes from 0.
        epochs: passes over the images.
        seed: of initial weights and order.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # those of GPUs are not forked here
        network = Classifier(images.shape[1], images.shape[2], int(labels.max()) + 1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for index in torch.randperm(len(images), generator=generator).split(64):
            loss = nn.functional.cross_entropy(network(images[index]), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return evaluating(network)
