"""The ratio table and plot of a benchmark run: how many times longer each rival takes than ours."""

import json
from pathlib import Path
from typing import Any

from fastens.files import whole


def read(path: Path) -> list[dict[str, Any]]:
    """Read a pytest-benchmark file; one row per question and rival.

    Raises:
        ValueError: not such a file, or one without the rivals that this project's benchmarks record.
    """
    try:
        benchmarks = json.loads(path.read_text())["benchmarks"]
    except (json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"{path} is no result of pytest-benchmark: {error}") from error
    rows = []
    for benchmark in benchmarks:
        extra, ours = benchmark["extra_info"], benchmark["stats"]["median"]
        if "rivals" not in extra:
            raise ValueError(f"{path}: {benchmark['name']} records no rivals; run the files under bench/")
        for rival, (low, middle, high) in extra["rivals"].items():
            rows.append(
                {
                    "question": benchmark["group"],
                    "shape": extra["shape"],
                    "rival": rival,
                    "ours": ours,
                    "theirs": middle,
                    "ratio": middle / ours,
                    "low": low / ours,
                    "high": high / ours,
                    "wanted": extra["wanted"].get(rival),
                    "scale": extra.get("scale", {}),
                    "peak_ours": extra.get("peak_bytes", {}).get("ours", 0),
                    "peak_theirs": extra.get("peak_bytes", {}).get(rival, 0),
                }
            )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table; times are medians in milliseconds."""
    lines = ["| question | rival | ours, ms | rival, ms | ratio | goal |", "|---|---|---|---|---|---|"]
    for row in rows:
        goal = "" if row["wanted"] is None else f"{row['wanted']:g}"
        lines.append(
            f"| {row['question']} | {row['rival']} | {_milliseconds(row['ours'])} | {_milliseconds(row['theirs'])} "
            f"| {row['ratio']:.2f} | {goal} |"
        )
    return "\n".join(lines)


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}" if seconds >= 1e-4 else f"{1e3 * seconds:.4f}"


def memory_table(rows: list[dict[str, Any]]) -> str:
    """Peak memory beside time as a Markdown table: weights, packed copies, activations; empty where none is known."""
    lines = ["| question | rival | ours, MiB | rival, MiB | of the rival's | time ratio |", "|---|---|---|---|---|---|"]
    for row in rows:
        if row["peak_ours"] and row["peak_theirs"]:
            ours, theirs = row["peak_ours"] / 2**20, row["peak_theirs"] / 2**20
            lines.append(
                f"| {row['question']} | {row['rival']} | {ours:.1f} | {theirs:.1f} | {ours / theirs:.2f} "
                f"| {row['ratio']:.2f} |"
            )
    return "\n".join(lines) if len(lines) > 2 else ""


def plot_scaling(rows: list[dict[str, Any]], path: Path) -> bool:
    """Draw time against K and against B, one line per contender; return whether any question was about that."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = _scaling_lines(rows)
    if not lines:
        return False
    figure, axes = plt.subplots(1, len(lines), figsize=(5 * len(lines), 4), constrained_layout=True, squeeze=False)
    for axis, ((network, dtype, fixed, over), contenders) in zip(axes[0], sorted(lines.items()), strict=True):
        for name, points in contenders.items():
            numbers, seconds = zip(*sorted(points.items()), strict=True)
            axis.plot(numbers, [1e3 * s for s in seconds], marker="o", label=name, linewidth=2 if name == "ours" else 1)
        axis.set(xscale="log", yscale="log", xlabel=over, ylabel="ms", title=f"{network}, {dtype}, {fixed}")
        axis.legend(fontsize=8)
    with whole(path) as (partial,):
        figure.savefig(partial, dpi=110)
    plt.close(figure)
    return True


def _scaling_lines(rows: list[dict[str, Any]]) -> dict[tuple[str, str, str, str], dict[str, dict[int, float]]]:
    """Panel -> contender -> K or B -> seconds, of panels with three numbers or more."""
    lines: dict[tuple[str, str, str, str], dict[str, dict[int, float]]] = {}
    for row in rows:
        scale = row["scale"]
        if not scale:
            continue
        for over, other in (("K", "B"), ("B", "K")):
            key = (scale["network"], scale["dtype"], f"{other} = {scale[other]}", over)
            panel = lines.setdefault(key, {})
            panel.setdefault("ours", {})[scale[over]] = row["ours"]
            panel.setdefault(row["rival"], {})[scale[over]] = row["theirs"]
    return {key: panel for key, panel in lines.items() if len(panel["ours"]) > 2}


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the ratios with their quartiles, and the goals as ticks."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 0.32 * len(rows) + 1.2), constrained_layout=True)
    for i, row in enumerate(rows):
        errors = [[max(0.0, row["ratio"] - row["low"])], [max(0.0, row["high"] - row["ratio"])]]
        axis.barh(i, row["ratio"], xerr=errors, color="tab:blue" if row["ratio"] >= 1 else "tab:red")
        if row["wanted"] is not None:
            axis.plot([row["wanted"]] * 2, [i - 0.4, i + 0.4], color="black")
    axis.set_yticks(range(len(rows)), [f"{row['question']}: {row['rival']}" for row in rows], fontsize=8)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.axvline(1, color="0.5", linewidth=0.8)
    axis.set_xlabel("rival's time over ours (median and quartiles); black: the goal")
    with whole(path) as (partial,):
        figure.savefig(partial, dpi=110)
    plt.close(figure)
