"""The demo's picture: samples by rule, where the members disagree, and the time of an evaluation."""

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fastens.files import whole

COLUMNS, ROWS = 16, 2


def tiled(images: np.ndarray, columns: int) -> np.ndarray:
    """Images [n, H, W] side by side in rows of ``columns``, one pixel apart."""
    n, height, width = images.shape
    rows = -(-n // columns)
    sheet = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1), np.nan)
    for i, image in enumerate(images):
        top, left = i // columns * (height + 1), i % columns * (width + 1)
        sheet[top : top + height, left : left + width] = image
    return sheet


def draw(
    images: dict[str, np.ndarray], variance: Tensor, timing: list[dict[str, Any]], num_members: int, path: Path
) -> None:
    """Write the picture.

    Args:
        images: by rule, [n, H, W, 1] in [0, 1], from the same starting noise.
        variance: [n, 1, H, W], the members' variance on the samples of the mean.
        timing: from :func:`fastens.demo.run.time_evaluations`.
        num_members: K.
        path: of the PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(COLUMNS, len(images["mean"]))
    shown = {rule: batch[: ROWS * columns, :, :, 0] for rule, batch in images.items()}
    figure = plt.figure(figsize=(15, 8.5), constrained_layout=True)
    figure.suptitle(f"{num_members} U-Nets trained on digits, one ensemble: the same starting noise under every rule")
    panels: Any = figure.subfigures(1, 2, width_ratios=(3, 2))
    left, right = panels
    axes: Any = left.subplots(len(shown) + 1, 1)
    for axis, (rule, batch) in zip(axes, shown.items(), strict=False):
        axis.imshow(tiled(batch, columns), cmap="gray", vmin=0, vmax=1)
        axis.set_ylabel(rule, rotation=0, ha="right", va="center")
    maps = axes[-1].imshow(tiled(variance[: ROWS * columns, 0].numpy(), columns), cmap="magma")
    axes[-1].set_ylabel("variance of\nthe members", rotation=0, ha="right", va="center")
    axes[-1].set_xlabel("where the members disagree about the noise (ε, at t = 300) in the samples of the mean")
    left.colorbar(maps, ax=axes[-1], shrink=0.9)
    for axis in axes:
        axis.set_xticks([])
        axis.set_yticks([])
    batches = sorted({row["batch"] for row in timing})
    for axis, batch in zip(np.atleast_1d(right.subplots(len(batches), 1)), batches, strict=True):
        rows = [row for row in timing if row["batch"] == batch]
        for i, row in enumerate(rows):
            theirs = row["contender"] in ("loop", "vmap")
            if row["quartiles"] is None:
                axis.text(0, i, f" does not run: {row['failed'][:60]}", va="center", fontsize=7)
                continue
            low, middle, high = (1e3 * q for q in row["quartiles"])
            bar = axis.barh(i, middle, xerr=[[middle - low], [high - middle]], color="0.6" if theirs else "tab:blue")
            axis.bar_label(bar, [f"{middle:.1f} ms"], padding=4, fontsize=8)
        axis.set_yticks(range(len(rows)), [row["contender"] for row in rows])
        axis.invert_yaxis()
        axis.margins(x=0.18)
        axis.set_title(f"one score evaluation, batch {batch} (ours blue; median and quartiles)", fontsize=10)
        axis.set_xlabel("ms")
        axis.spines[["top", "right"]].set_visible(False)
    with whole(path) as (partial,):
        figure.savefig(partial, dpi=110, bbox_inches="tight")  # the longest label reaches past the margin
    plt.close(figure)
