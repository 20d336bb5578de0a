"""Medical images: where a segmentation network doubts itself, by MC Dropout.

The images are made: discs ("lesions") of two contrasts in noise, some hardly visible. A small U-Net with dropout is
trained on them in about a minute; its dropout masks are the members. ``python examples/segmentation.py [FOLDER]``
writes ``segmentation.png``, all deviations on one scale, and prints whether the doubt is where the errors are.
"""

import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastens
from fastens import uncertainty

SIZE, MASKS, TRAINING_STEPS, BATCH, SHOWN, TESTED = 32, 20, 400, 32, 6, 64


def images(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noisy images and the discs in them, both [count, 1, SIZE, SIZE]."""
    centre = torch.rand(count, 2, 2, generator=generator) * 20 + 6
    radius = torch.rand(count, 2, generator=generator) * 4 + 3
    contrast = torch.rand(count, 2, generator=generator) * 0.9 + 0.3
    grid = torch.stack(torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")).float()
    distance = (grid - centre[:, :, :, None, None]).square().sum(2).sqrt()
    discs = distance < radius[:, :, None, None]
    clean = (discs * contrast[:, :, None, None]).amax(1, keepdim=True)
    return clean + 0.4 * torch.randn(clean.shape, generator=generator), discs.any(1, keepdim=True).float()


class UNet(nn.Module):
    """Two resolutions, dropout at the lower one; logits [B, 1, H, W]."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU())
        self.low = nn.Sequential(
            nn.Conv2d(width, 2 * width, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Dropout2d(0.2),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.Dropout2d(0.2),
        )
        self.out = nn.Sequential(
            nn.Conv2d(3 * width, width, 3, padding=1), nn.ReLU(), nn.Dropout2d(0.2), nn.Conv2d(width, 1, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images."""
        fine = self.down(x)
        return self.out(torch.cat([fine, F.interpolate(self.low(fine), scale_factor=2.0)], 1))


def train() -> nn.Module:
    """Train one network, as always; there is nothing to prepare for MC Dropout but the dropout."""
    torch.manual_seed(0)
    network = UNet().train()
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(TRAINING_STEPS):
        x, truth = images(BATCH, generator)
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(network(x), truth).backward()
        optimizer.step()
    return network.eval()


def main(folder: Path) -> None:
    """Train, segment, print the figures and draw the doubts."""
    network = train()
    ensemble = fastens.MCDropout(network, num_members=MASKS)
    x, truth = images(TESTED, torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = ensemble.member_outputs(x).sigmoid()  # [K, B, 1, H, W], in one pass
        plain = network(x).sigmoid()
    mean, doubt = found.mean(0), found.std(0)
    curves = uncertainty.sparsification((mean - truth).abs(), doubt)
    print(f"Brier score {(mean - truth).square().mean():.4f}, with dropout off {(plain - truth).square().mean():.4f}")
    print(f"AUSE {curves.ause:.3f}: 0 where the doubt ranks pixels as the error does")
    folder.mkdir(parents=True, exist_ok=True)
    draw(x, truth, mean, doubt).savefig(folder / "segmentation.png", dpi=90)
    print(f"picture: {folder / 'segmentation.png'}")


def draw(x: Tensor, truth: Tensor, mean: Tensor, doubt: Tensor) -> plt.Figure:
    """Draw a row for each image; deviations and errors are on one colour scale, which is drawn."""
    error = (mean - truth).abs()
    top = float(torch.maximum(doubt, error)[:SHOWN].max())
    columns = {"image": x, "truth": truth, "mean": mean, "deviation": doubt, "error": error}
    shown = min(SHOWN, len(x))
    figure, axes = plt.subplots(shown, 5, figsize=(7.5, 1.35 * shown), squeeze=False, layout="constrained")
    for row, line in enumerate(axes):
        for axis, (name, values) in zip(line, columns.items(), strict=True):
            axis.axis("off")
            if not row:
                axis.set_title(name, fontsize=9)
            maps = name in ("deviation", "error")
            scale = {"cmap": "magma", "vmin": 0, "vmax": top} if maps else {"cmap": "gray"}
            if name in ("truth", "mean"):
                scale |= {"vmin": 0, "vmax": 1}
            drawn = axis.imshow(values[row, 0].numpy(), **scale)
    figure.colorbar(drawn, ax=axes, shrink=0.6, label="deviation of 20 masks; error")
    return figure


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "segmentation"))
