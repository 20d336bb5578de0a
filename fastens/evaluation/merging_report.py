"""The report on merging: a page, a picture and JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastens.evaluation.merging import BEST, ENSEMBLE, MergeStudy
from fastens.files import whole, write_json, write_whole


def as_dict(study: MergeStudy) -> dict[str, Any]:
    """The study's numbers."""
    found: dict[str, Any] = {
        "members": study.members.mean(1).tolist(),
        "pool": study.pool,
        "weights": study.weights,
        "verdict": study.verdict(),
        "contenders": {},
    }
    for name, contender in study.contenders.items():
        found["contenders"][name] = {
            "loss": float(contender.rows.mean()),
            "against_best_single_percent": dataclasses.asdict(study.change(name)),
            "kept_of_the_gain": None if name == ENSEMBLE else dataclasses.asdict(study.kept(name)),
            "evaluations": contender.evaluations,
            "milliseconds": contender.milliseconds,
            "of": contender.what,
        }
    return found


def lines(study: MergeStudy) -> list[str]:
    """The verdict and the table, in Markdown."""
    one = study.contenders[BEST].milliseconds
    found = [f"- {said}" for said in study.verdict()]
    found += ["", "| | loss | against the best single, % | of the gain kept | cost | of |", "|---|---|---|---|---|---|"]
    for name, contender in study.contenders.items():
        change, kept = study.change(name), None if name == ENSEMBLE else study.kept(name)
        share = "1" if kept is None else f"{kept.value:.2f} [{kept.low:.2f}, {kept.high:.2f}]"
        found.append(
            f"| {name} | {contender.rows.mean():.5f} | {change.value:+.2f} [{change.low:+.2f}, {change.high:+.2f}] | "
            f"{share} | {contender.milliseconds / one:.1f} | {contender.what} |"
        )
    return [*found, ""]


def draw(studies: Mapping[str, MergeStudy], path: Path) -> None:
    """A panel of loss against cost for each study."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(studies), figsize=(6 * len(studies), 4.5), constrained_layout=True, squeeze=False
    )
    for axis, (name, study) in zip(axes[0], studies.items(), strict=True):
        study.plot(axis).set_title(name)
    with whole(path) as (partial,):
        figure.savefig(partial, format="png", dpi=100)
    plt.close(figure)


def write(studies: Mapping[str, MergeStudy], out: Path, title: str, intro: str, **facts: Any) -> dict[str, Any]:
    """Write ``report.md``, ``.png`` and ``.json`` into a folder.

    Args:
        studies: by the heading of each.
        out: the folder.
        title: of the page.
        intro: what it is about.
        **facts: for ``report.json``.
    """
    found = {**facts, "studies": {name: as_dict(study) for name, study in studies.items()}}
    page = [f"# {title}", "", intro, "", "![loss against cost](report.png)", ""]
    for name, study in studies.items():
        page += [f"## {name[:1].upper()}{name[1:]}", "", *lines(study)]
    page += [
        "Brackets are 95 % intervals over test rows (bootstrap, paired). The gain is the ensemble's over the mean of "
        "its members. Cost is the time of an evaluation of 16 rows, that of the best single member 1.",
        "",
    ]
    draw(studies, out / "report.png")
    write_whole(out / "report.md", "\n".join(page))
    write_json(out / "report.json", found)
    return found
