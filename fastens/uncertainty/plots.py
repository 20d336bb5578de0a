"""Pictures of what members disagree about; they need matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fastens.files import whole
from fastens.uncertainty.measures import Array, Sparsification, decompose


def _array(x: Array) -> np.ndarray:
    return x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)


def _image(x: np.ndarray) -> np.ndarray:
    """[H, W], or [H, W, 3], of [C, H, W] or [H, W]."""
    if x.ndim == 3 and x.shape[0] in (1, 3):
        x = x.transpose(1, 2, 0)
    return x[..., 0] if x.ndim == 3 and x.shape[-1] == 1 else x


def _grey(image: np.ndarray) -> np.ndarray:
    """[H, W] of [H, W] or [H, W, 3]: the mean over channels."""
    return image if image.ndim == 2 else image.mean(-1)


def _save(figure: Any, path: str | Path) -> None:
    import matplotlib.pyplot as plt

    with whole(Path(path)) as (partial,):
        figure.savefig(partial, dpi=150, bbox_inches="tight")
    plt.close(figure)


def plot_maps(samples: Array, path: str | Path, truth: Array | None = None, given: Array | None = None) -> None:
    """Draw, for each of B problems, a sample, the mean, the epistemic and the aleatoric deviation side by side.

    All deviations, and the error, are on one colour scale, which is drawn; it goes by the square root, so that small
    ones are seen. One sample of each member leaves nothing aleatoric to see, and no column for it.

    Args:
        samples: [K, N, B, C, H, W], or without C: N samples of each member for B problems, in [-1, 1].
        path: of the picture.
        truth: [B, C, H, W]; draws it and the error of the mean as well.
        given: [B, C, h, w], what the samples were made from, to draw beside them.

    Raises:
        ValueError: samples of fewer dimensions.
    """
    import matplotlib.pyplot as plt
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import PowerNorm

    x = _array(samples)
    if x.ndim not in (5, 6):
        raise ValueError(f"samples is {list(x.shape)}, expected [K, N, B, C, H, W] or [K, N, B, H, W]")
    parts, mean = decompose(x), x.mean((0, 1))
    images = {"given": given, "sample": x[0, 0], "mean": mean, "truth": truth}
    maps = {"epistemic": np.sqrt(parts.epistemic)}
    if x.shape[1] > 1:
        maps["aleatoric"] = np.sqrt(parts.aleatoric)
    if truth is not None:
        maps["error"] = np.abs(mean - _array(truth))
    images = {name: _array(value) for name, value in images.items() if value is not None}
    maps = {name: [_grey(_image(each)) for each in found] for name, found in maps.items()}
    top = max(float(each.max()) for found in maps.values() for each in found)
    scale = PowerNorm(0.5, 0, top)
    columns = [*images, *maps]
    size = (1.5 * len(columns) + 1, 1.5 * len(mean))
    figure, axes = plt.subplots(len(mean), len(columns), figsize=size, squeeze=False, layout="constrained")
    for row, line in enumerate(axes):
        for axis, name in zip(line, columns, strict=True):
            axis.axis("off")
            if row == 0:
                axis.set_title(name, fontsize=9)
            if name in images:
                axis.imshow(_image(images[name][row].clip(-1, 1) / 2 + 0.5), cmap="gray", vmin=0, vmax=1)
            else:
                axis.imshow(maps[name][row], cmap="magma", norm=scale)
    figure.colorbar(ScalarMappable(scale, "magma"), ax=axes, shrink=min(1.0, 3 / len(mean)), label="deviation")
    _save(figure, path)


def plot_rank_histogram(counts: Array, path: str | Path) -> None:
    """Draw what :func:`fastens.uncertainty.rank_histogram` counted, beside what one distribution would give."""
    import matplotlib.pyplot as plt

    found = _array(counts)
    figure, axis = plt.subplots(figsize=(5, 3))
    axis.bar(np.arange(len(found)), found / found.sum())
    axis.axhline(1 / len(found), color="black", linestyle="--", linewidth=1)
    axis.set_xlabel("rank of the truth")
    axis.set_ylabel("share")
    _save(figure, path)


def plot_sparsification(curves: Sparsification, path: str | Path) -> None:
    """Draw the curves of :func:`fastens.uncertainty.sparsification`."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5, 3))
    fractions = _array(curves.fractions)
    axis.plot(fractions, _array(curves.by_uncertainty), label=f"by uncertainty, AUSE {curves.ause:.3f}")
    axis.plot(fractions, _array(curves.by_error), linestyle="--", label="by error")
    axis.set_xlabel("removed")
    axis.set_ylabel("error of the rest, over that of all")
    axis.legend()
    _save(figure, path)
