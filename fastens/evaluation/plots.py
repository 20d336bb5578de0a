"""The report's picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastens.files import whole

SHOWN = {"mean": "tab:blue", "geometric": "tab:orange", "median": "tab:green", "dominant": "tab:red"}


def draw(report: dict[str, Any], path: Path) -> None:
    """Write a PNG: loss by noise level, loss and bits per dimension by number of members, Fréchet distances."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 8), constrained_layout=True)
    figure.suptitle(f"{report['members']} members on {report['subject']} (bars: one standard error over rows)")
    _levels(axes[0, 0], report["loss"])
    _sizes(axes[0, 1], report)
    _bits(axes[1, 0], report)
    _distances(axes[1, 1], report["quality"])
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    with whole(path) as (partial,):
        figure.savefig(partial, format="png", dpi=100)
    plt.close(figure)


def _levels(axis: Any, loss: dict[str, Any]) -> None:
    base = loss["member_mean_by_level"]
    for rule in SHOWN:
        relative = [100 * (value / mean - 1) for value, mean in zip(loss["rules"][rule]["by_level"], base, strict=True)]
        error = [100 * e / mean for e, mean in zip(loss["rules"][rule]["by_level_error"], base, strict=True)]
        axis.errorbar(loss["times"], relative, error, marker=".", label=rule, color=SHOWN[rule], capsize=2)
    spread = [100 * d / mean for d, mean in zip(loss["diversity_by_level"], base, strict=True)]
    axis.plot(loss["times"], spread, "k:", label="diversity")
    axis.axhline(0, color="0.5", linewidth=0.8)
    axis.set(
        title="loss by noise level, against the member mean", xlabel="t (noise grows)", ylabel="change of the loss, %"
    )
    axis.legend(fontsize=8)


def _sizes(axis: Any, report: dict[str, Any]) -> None:
    loss, total = report["loss"], report["members"]
    for rule in ("mean", "geometric", "median"):
        found = [loss["by_size"][rule][str(k)] for k in range(1, total)] + [loss["rules"][rule]]
        values, errors = ([each[key] for each in found] for key in ("value", "error"))
        axis.errorbar(range(1, total + 1), values, errors, marker="o", label=rule, color=SHOWN[rule], capsize=2)
    axis.axhline(loss["best_member"]["value"], color="0.5", linestyle="--", label="best member")
    labels = {"xlabel": "members", "ylabel": "mean squared error of the noise"}
    axis.set(title="denoising loss by number of members", xticks=range(1, total + 1), **labels)
    axis.legend(fontsize=8)


def _bits(axis: Any, report: dict[str, Any]) -> None:
    bits, total = report["likelihood"], report["members"]
    sizes = sorted(int(k) for k in bits["by_size"])
    values, errors = ([bits["by_size"][str(k)][key] for k in sizes] for key in ("value", "error"))
    axis.errorbar(sizes, values, errors, marker="o", label="mean", color=SHOWN["mean"], capsize=2)
    for rule in ("geometric", "dominant"):
        found = bits["rules"][rule]
        axis.errorbar([total], found["value"], found["error"], fmt="x", label=rule, color=SHOWN[rule], capsize=2)
    axis.axhline(bits["best_member"], color="0.5", linestyle="--", label="best member")
    labels = {"xlabel": "members", "ylabel": "bits/dim (less is better)"}
    axis.set(title="bits per dimension by number of members", xticks=range(1, total + 1), **labels)
    axis.legend(fontsize=8)


def _distances(axis: Any, quality: dict[str, Any]) -> None:
    axis.set_title("Fréchet distance of samples (95 % intervals)")
    if "contenders" not in quality:
        axis.text(0.5, 0.5, quality["note"], ha="center", wrap=True, transform=axis.transAxes)
        return
    names = list(quality["contenders"])
    for i, name in enumerate(names):
        found = quality["contenders"][name]["frechet"]
        error = [[found["value"] - found["low"]], [found["high"] - found["value"]]]
        of_rule = not name.startswith("member ")
        first = i == 0 or names[i - 1].startswith("member ") == of_rule
        label = ("rules" if of_rule else "single members") if first else None
        axis.barh(i, found["value"], xerr=error, color="tab:blue" if of_rule else "0.6", label=label)
    floor = quality["training_images"]["frechet"]["value"]
    axis.axvline(floor, color="k", linestyle=":", label="other real images")
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.invert_yaxis()
    axis.set(xlabel="Fréchet distance (less is better)", ylim=(len(names) + 0.6, -0.6))
    axis.legend(fontsize=8, loc="lower right", ncols=3)  # below the last bar
