"""The tabular finding as a table, a picture and sentences."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np

from fastens.files import write_whole
from fastens.tabular.finding import CORRECTED, DATA, GAINS, RULES, Settings

CONTENDERS = (*RULES, *CORRECTED)
SHOWN = ("mixture", "mean", "geometric", "median", "dominant", *CORRECTED)  # the others are far outside
NAMES = {"mixture": "one tree (mixture)"}
COLUMNS = {
    "w1_train": "W1 to training rows",
    "coverage": "coverage",
    "downstream": "F1 or R²",
    "told_apart": "real or generated (ROC area)",
}


def write(records: list[dict[str, Any]], settings: Settings, out: Path) -> list[str]:
    """Write ``report.csv``, ``report.md`` and ``report.png`` into ``out``; return the verdict.

    Raises:
        OSError: the folder cannot be written.
    """
    lines = verdict(records, settings)
    fields = list(dict.fromkeys(key for record in records for key in record))
    table = io.StringIO()
    writer = csv.DictWriter(table, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    write_whole(out / "report.csv", table.getvalue().encode())
    write_whole(out / "report.md", markdown(records, settings, lines).encode())
    write_whole(out / "report.png", picture(records, settings))
    return lines


def values(records: list[dict[str, Any]], data: str, setting: str, contender: str, what: str) -> np.ndarray:
    """[seeds], in the order of the seeds."""
    mine = [r for r in records if (r["data"], r["setting"], r["contender"]) == (data, setting, contender)]
    return np.array([r[what] for r in sorted(mine, key=lambda r: r["seed"])])


def settings_of(settings: Settings) -> tuple[str, str, str]:
    """The claim's setting, and the two of its boundary."""
    return f"depth {settings.depth}", "unlimited depth", "deterministic"


def verdict(records: list[dict[str, Any]], settings: Settings) -> list[str]:
    """Sentences that count, over data sets and seeds, where each rule's rows are nearest to the test rows."""
    lines = []
    runs = len(settings.data) * settings.seeds
    for setting in settings_of(settings):
        won, beaten, largest = dict.fromkeys(RULES, 0), dict.fromkeys(CORRECTED, 0), 0
        for data in settings.data:
            distance = {c: values(records, data, setting, c, "w1_test") for c in CONTENDERS}
            error = {c: values(records, data, setting, c, "error") for c in RULES if c not in ("sum", "max_abs")}
            for seed in range(settings.seeds):
                won[min(RULES, key=lambda c: distance[c][seed])] += 1
                for corrected in CORRECTED:
                    beaten[corrected] += int(distance[corrected][seed] < min(distance[c][seed] for c in RULES))
                largest += int(max(error, key=lambda c: error[c][seed]) == "dominant")
        wins = ", ".join(f"{NAMES.get(c, c)} {n}" for c, n in sorted(won.items(), key=lambda pair: -pair[1]) if n)
        lines.append(
            f"{setting[0].upper()}{setting[1:]}: of the paper's rules, nearest to test rows in {runs} runs: {wins}. "
            f"`dominant` has the largest loss (`sum` and `max_abs` apart) in {largest}. The mean with a gain is nearer "
            f"than all of them in {beaten[CORRECTED[0]]} (by norm) and {beaten[CORRECTED[1]]} (by distance)."
        )
    return lines


def markdown(records: list[dict[str, Any]], settings: Settings, lines: list[str]) -> str:
    """The report."""
    seconds = sum({(r["data"], r["seed"], r["depth"]): r["seconds"] for r in records}.values())
    copies = ", ".join(f"{settings.copies or DATA[name]} ({name})" for name in settings.data)
    text = [
        "# Rules of aggregation on tables",
        "",
        f"ForestDiffusion, VP, {settings.levels} noise levels, {settings.trees} trees a level (a forest per class), "
        f"half of each data set to train on and half to judge by, {settings.seeds} seeds (split, training and noise). "
        f"Distances are means over {settings.tables} generated tables as long as the training rows; ± is the standard "
        "deviation over seeds. Loss: mean squared error of the predicted noise on test rows. W1: 1-Wasserstein, L1 on "
        f"columns scaled to the real range. Noisy copies of a row: {copies}; "
        f"{seconds / 60:.0f} minutes in all.",
        "",
        "![W1 to test rows by rule, data set and setting](report.png)",
        "",
        "## Verdict",
        "",
        *(f"- {line}" for line in lines),
        "",
        "A gain is one factor of the mean's predictions, chosen on training rows: by norm (their root mean square "
        "becomes the noise's) or by distance (of the tried gains, the one whose rows are nearest to training rows; the "
        f"tried ones end at {GAINS[-1]:.2f}).",
    ]
    for setting in settings_of(settings):
        text += ["", f"## {setting[0].upper()}{setting[1:]}", "", loss_and_distance(records, settings, setting)]
    first = settings_of(settings)[0]
    for what, title in COLUMNS.items():
        text += ["", f"## {title}, {first}", "", _table(records, settings, first, [what])]
    return "\n".join([*text, ""])


def loss_and_distance(records: list[dict[str, Any]], settings: Settings, setting: str) -> str:
    """The table of loss and W1 to test rows, by contender and data set."""
    return _table(records, settings, setting, ["error", "w1_test"])


def _table(records: list[dict[str, Any]], settings: Settings, setting: str, what: list[str]) -> str:
    titles = {"error": "loss", "w1_test": "W1"}
    heads = [f"{data} {titles[w]}" if w in titles else data for data in settings.data for w in what]
    rows = [f"| | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    for contender in CONTENDERS:
        cells = []
        for data in settings.data:
            for w in what:
                found = values(records, data, setting, contender, w)
                cells.append(_cell(found))
            if contender in CORRECTED and what[0] == "error":
                gain = values(records, data, setting, contender, "gain").mean()
                cells[-1] += f" (γ {gain:.2f})"
        rows.append(f"| {NAMES.get(contender, contender)} | {' | '.join(cells)} |")
    if what[-1] in ("w1_test", "coverage"):
        floor = [values(records, data, "training rows", "training rows", what[-1]) for data in settings.data]
        rows.append(f"| training rows | {' | '.join('| ' * (len(what) - 1) + _cell(one) for one in floor)} |")
    return "\n".join(rows)


def _cell(found: np.ndarray) -> str:
    spread = f" ± {found.std(ddof=1):.2g}" if len(found) > 1 else ""
    return f"{found.mean():.3g}{spread}"


def picture(records: list[dict[str, Any]], settings: Settings) -> bytes:
    """A PNG: W1 to test rows, one panel a data set, the settings side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    width = 4 * len(settings.data)
    figure, axes = plt.subplots(1, len(settings.data), figsize=(width, 4), squeeze=False, constrained_layout=True)
    for axis, data in zip(axes[0], settings.data, strict=True):
        for i, setting in enumerate(settings_of(settings)):
            found = [values(records, data, setting, c, "w1_test") for c in SHOWN]
            places = np.arange(len(SHOWN)) + 0.26 * (i - 1)
            axis.bar(places, [one.mean() for one in found], 0.24, color=f"C{i}", label=setting)
            for place, one in zip(places, found, strict=True):
                axis.plot(np.full(len(one), place), one, "k.", markersize=3)
        floor = values(records, data, "training rows", "training rows", "w1_test").mean()
        axis.axhline(floor, color="0.5", linestyle="--", linewidth=0.8, label="training rows")
        axis.set_title(data)
        axis.set_xticks(range(len(SHOWN)), [NAMES.get(c, c) for c in SHOWN], rotation=45, ha="right", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("W1 to test rows")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    plt.close(figure)
    return buffer.getvalue()
