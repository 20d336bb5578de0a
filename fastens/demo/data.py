"""Real images that scikit-learn bundles: hand-written digits (UCI ML, 8x8) and patches of two colour photographs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

TRAIN_ROWS = 1400
PATCH = 16
PATCH_TRAIN_ROWS = 1600


def load_digits() -> tuple[Tensor, Tensor]:
    """Training and test images, float32 [1400, 1, 8, 8] and [397, 1, 8, 8] in [-1, 1], split by a fixed permutation."""
    from sklearn.datasets import load_digits as bundled

    digits: Any = bundled()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order[:TRAIN_ROWS]], images[order[TRAIN_ROWS:]]


def load_photographs() -> tuple[Tensor, Tensor]:
    """Patches of two photographs, in colour: float32 [1600, 3, 16, 16] and [480, 3, 16, 16] in [-1, 1].

    The patches tile the photographs without overlap, and a fixed permutation splits them.
    """
    from sklearn.datasets import load_sample_images

    tiles = []
    for photograph in load_sample_images().images:
        pixels = torch.from_numpy(photograph.copy()).permute(2, 0, 1).float() / 127.5 - 1  # [3, 427, 640]
        cut = pixels.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)  # [3, rows, columns, 16, 16]
        tiles.append(cut.permute(1, 2, 0, 3, 4).reshape(-1, 3, PATCH, PATCH))
    patches = torch.cat(tiles)
    order = torch.randperm(len(patches), generator=torch.Generator().manual_seed(0))
    return patches[order[:PATCH_TRAIN_ROWS]], patches[order[PATCH_TRAIN_ROWS:]]


LOADERS: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {"digits": load_digits, "photographs": load_photographs}


def load_labels(data: str) -> tuple[Tensor, Tensor]:
    """Classes of the training and test images, int64: the digit, or which photograph and which third of its height."""
    if data == "digits":
        from sklearn.datasets import load_digits as bundled

        digits: Any = bundled()
        labels, train_rows = torch.from_numpy(digits.target).long(), TRAIN_ROWS
    else:
        from sklearn.datasets import load_sample_images

        bands = []
        for i, photograph in enumerate(load_sample_images().images):
            rows, columns = photograph.shape[0] // PATCH, photograph.shape[1] // PATCH
            bands.append((3 * i + 3 * torch.arange(rows) // rows).repeat_interleave(columns))
        labels, train_rows = torch.cat(bands), PATCH_TRAIN_ROWS
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return labels[order[:train_rows]], labels[order[train_rows:]]
