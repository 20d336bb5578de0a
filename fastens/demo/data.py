"""The digits of scikit-learn (UCI ML hand-written digits, 1797 real images of 8x8 pixels)."""

import torch
from torch import Tensor

TRAIN_ROWS = 1400


def load_digits() -> tuple[Tensor, Tensor]:
    """Training and test images, float32 [1400, 1, 8, 8] and [397, 1, 8, 8] in [-1, 1], split by a fixed permutation."""
    from sklearn.datasets import load_digits as bundled

    images = torch.tensor(bundled().images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order[:TRAIN_ROWS]], images[order[TRAIN_ROWS:]]
