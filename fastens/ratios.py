"""The ratio table and plot of a benchmark run: how many times longer each rival takes than ours."""

import json
from pathlib import Path
from typing import Any


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
                }
            )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table; times are medians in milliseconds."""
    lines = ["| question | rival | ours, ms | rival, ms | ratio | goal |", "|---|---|---|---|---|---|"]
    for row in rows:
        goal = "" if row["wanted"] is None else f"{row['wanted']:g}"
        lines.append(
            f"| {row['question']} | {row['rival']} | {1e3 * row['ours']:.2f} | {1e3 * row['theirs']:.2f} "
            f"| {row['ratio']:.2f} | {goal} |"
        )
    return "\n".join(lines)


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
    figure.savefig(path, dpi=110)
    plt.close(figure)
