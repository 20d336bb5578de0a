"""The report in words and tables: Markdown, CSV, LaTeX, and the verdict."""

from __future__ import annotations

import csv as table_of
import io
import re
from typing import Any

from fastens.evaluation import mc_dropout
from fastens.evaluation.table import Table

ENOUGH = 0.9  # of the full ensemble's gain
FEW = 16  # test rows


def verdict(report: dict[str, Any]) -> list[str]:
    """Sentences that say which rule, how many members, what it costs, and where it does not pay."""
    loss, bits, cost = report["loss"], report["likelihood"], report["cost"]["milliseconds"]
    by_loss = sorted(loss["rules"], key=lambda rule: loss["rules"][rule]["value"])
    best = by_loss[0]
    gain, over_best = (loss["rules"][best][key] for key in ("against_member_mean", "against_best_member"))
    change = _percent(abs(gain["value"]), loss["member_mean"]["value"])
    lines = [
        f"Loss: {best} is the best rule. Its loss is {change} {'below' if gain['value'] <= 0 else 'above'} the member "
        f"mean ({_difference(gain)}), and differs from the best member's by {_difference(over_best)}."
    ]
    if loss["rows"] < FEW:
        lines.insert(0, f"Only {loss['rows']} test rows: too few to tell rules apart; what follows is of these alone.")
    sizes = {int(k): v["value"] for k, v in loss["by_size"]["mean"].items()}
    sizes[report["members"]] = loss["rules"]["mean"]["value"]
    full = loss["member_mean"]["value"] - sizes[report["members"]]
    if full > 0 and report["members"] > 2:
        enough = min(k for k, v in sizes.items() if loss["member_mean"]["value"] - v >= ENOUGH * full)
        half = 100 * (loss["member_mean"]["value"] - sizes.get(2, sizes[report["members"]])) / full
        needed = f"and {enough} give at least" if enough < report["members"] else "and fewer than all do not give"
        lines.append(
            f"Members: 2 give {half:.0f} % of the gain of {report['members']}, {needed} {100 * ENOUGH:.0f} % of it."
        )
    hurt = [r for r in by_loss if _above(loss["rules"][r]["against_member_mean"])]
    if hurt:
        lines.append(f"Rules that raise the loss above the member mean: {', '.join(hurt)}.")
    by_bits = min(bits["rules"], key=lambda rule: bits["rules"][rule]["value"])
    found = bits["rules"][by_bits]
    lines.append(
        f"Likelihood: {by_bits} is the best rule, {found['value']:.3f} bits/dim against "
        f"{bits['by_size']['1']['value']:.3f} for the member mean "
        f"({_difference(found['against_member_mean'], 3)}); it is better on "
        f"{_percent(found['rows_better_than_member_mean'], 1)} of the test rows."
    )
    lines += _quality_verdict(report["quality"], by_loss)
    lines.append(mc_dropout.verdict(report["mc_dropout"]))
    lines += _weights_verdict(loss["weights"])
    ratio = cost[best] / cost["one member"]
    lines.append(
        f"Cost: one evaluation by {best} takes {ratio:.1f} times that of one member at batch {report['cost']['batch']} "
        f"({cost[best]:.0f} ms; the members one by one, each by its own plan: "
        f"{cost['members one by one']:.0f} ms)."
    )
    return lines


def _quality_verdict(quality: dict[str, Any], by_loss: list[str]) -> list[str]:
    if "contenders" not in quality:
        return [f"Sample quality: not judged; {quality['note']}."]
    distances = {name: found["frechet"] for name, found in quality["contenders"].items()}
    member = min((n for n in distances if n.startswith("member ")), key=lambda n: distances[n]["value"])
    rule = min((n for n in distances if not n.startswith("member ")), key=lambda n: distances[n]["value"])
    sampled = [r for r in by_loss if r in distances]
    of_loss = distances[sampled[0]]
    beats = of_loss["high"] < distances[member]["low"]
    best_apart = all(distances[rule]["high"] < distances[other]["low"] for other in sampled if other != rule)
    return [
        f"Samples: the rule of least loss, {sampled[0]}, has a Fréchet distance of {_interval(of_loss)}; the best "
        f"member has {_interval(distances[member])}. "
        + ("It pays." if beats else "The ensemble does not beat it.")
        + " "
        f"The rule of least distance is {rule}, {_interval(distances[rule])}"
        + ("." if best_apart else ", an interval that overlaps another rule's.")
    ]


def _weights_verdict(weights: dict[str, Any]) -> list[str]:
    held = weights["simplex"]["held_out"]
    if held["value"] > 2 * held["error"]:
        return [f"Weights fitted per noise level lower the held-out loss by {held['value']:.6f} ± {held['error']:.6f}."]
    return [
        f"Weights fitted per noise level do not lower the held-out loss: the gain over equal weights is "
        f"{held['value']:+.6f} ± {held['error']:.6f}."
    ]


def _above(difference: dict[str, float]) -> bool:
    return difference["value"] > 2 * difference["error"]


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %"


def _difference(difference: dict[str, float], digits: int = 5) -> str:
    return f"{difference['value']:+.{digits}f} ± {difference['error']:.{digits}f}"


def _interval(found: dict[str, float]) -> str:
    return f"{found['value']:.3g} [{found['low']:.3g}, {found['high']:.3g}]"


def _loss_table(loss: dict[str, Any]) -> Table:
    rows = [[name, f"{loss[key]['value']:.5f}", "", ""] for name, key in _BASELINES.items()]
    for rule, found in loss["rules"].items():
        against = [_difference(found[key]) for key in ("against_member_mean", "against_best_member")]
        rows.append([rule, f"{found['value']:.5f}", *against])
    head = ["denoising loss", "value", "against the member mean", "against the best member"]
    return Table("Denoising loss", head, rows)


_BASELINES = {"member mean": "member_mean", "best member": "best_member"}


def _size_table(report: dict[str, Any]) -> Table:
    loss, bits = report["loss"], report["likelihood"]
    rows = []
    for k in range(1, report["members"] + 1):
        losses = [
            loss["rules"][rule]["value"] if k == report["members"] else loss["by_size"][rule][str(k)]["value"]
            for rule in ("mean", "geometric", "median")
        ]
        measured = f"{bits['by_size'][str(k)]['value']:.4f}" if str(k) in bits["by_size"] else ""
        rows.append([str(k), *(f"{v:.5f}" for v in losses), measured])
    head = ["members", "loss, mean", "loss, geometric", "loss, median", "bits/dim, mean"]
    return Table("By number of members", head, rows)


def _bits_table(bits: dict[str, Any]) -> Table:
    rows = [["member mean", f"{bits['by_size']['1']['value']:.4f}", "", ""]]
    rows.append(["best member", f"{bits['best_member']:.4f}", "", ""])
    for rule, found in bits["rules"].items():
        share = f"{100 * found['rows_better_than_member_mean']:.1f} %"
        rows.append([rule, f"{found['value']:.4f}", _difference(found["against_member_mean"], 4), share])
    head = ["likelihood", "bits/dim", "against the member mean", "rows better than their member mean"]
    return Table("Likelihood", head, rows)


def _quality_table(quality: dict[str, Any]) -> Table:
    rows = []
    for name, found in {**quality["contenders"], "other real images": quality["training_images"]}.items():
        score = _interval(found["score"]) if found["score"] else ""
        shares = [f"{found[key]:.3f}" for key in ("precision", "recall")]
        rows.append([name, _interval(found["frechet"]), _interval(found["kernel"]), score, *shares])
    head = ["samples", "Fréchet distance", "kernel distance", "Inception score", "precision", "recall"]
    return Table("Samples", head, rows)


def _weights_table(weights: dict[str, Any]) -> Table:
    rows = [[name, *(_difference(found[key], 6) for key in ("fit", "held_out"))] for name, found in weights.items()]
    head = ["constraint", "gain on the rows fitted on", "gain on held-out rows"]
    return Table("Weights by noise level", head, rows)


def _cost_table(cost: dict[str, Any]) -> Table:
    return Table("Cost", list(cost["milliseconds"]), [[f"{value:.1f}" for value in cost["milliseconds"].values()]])


def sections(report: dict[str, Any]) -> list[tuple[str, list[str], Table | None]]:
    """The parts of the report: title, paragraphs, and table; a part that was not computed has no table."""
    loss, bits, cost, quality = report["loss"], report["likelihood"], report["cost"], report["quality"]
    settings, dropout = report["settings"], report["mc_dropout"]
    judged = "contenders" in quality
    identity = (
        f"The gain of the mean, {loss['gain_of_mean']:.7f}, is the diversity of the members, "
        f"{loss['diversity']['value']:.7f}; at no level do the two differ by more than {loss['identity_gap']:.0e}."
    )
    levels = f"Mean squared error of the predicted noise: {loss['rows']} test rows, {len(loss['times'])} noise levels."
    samples = (
        f"{settings['samples']} samples of each, {settings['sampler_steps']} DDIM steps from the same noise, against "
        f"the test images; {quality['note']}."
    )
    samples = samples if judged else f"Not judged: {quality['note']}."
    ode = f"{bits['rows']} test rows, probability-flow ODE, {bits['evaluations']} evaluations; {bits['how']}."
    clock = f"Milliseconds of one evaluation at batch {cost['batch']}, {report['threads']} threads, medians of five."
    return [
        ("Denoising loss", [levels, identity], _loss_table(loss)),
        ("By number of members", [], _size_table(report)),
        ("Likelihood", [ode], _bits_table(bits)),
        (
            "Samples",
            [samples if judged else f"Not judged: {quality['note']}."],
            _quality_table(quality) if judged else None,
        ),
        ("MC Dropout", mc_dropout.notes(dropout), mc_dropout.table(dropout)),
        ("Weights by noise level", [], _weights_table(loss["weights"])),
        ("Cost", [clock], _cost_table(cost)),
    ]


def markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    drawn = "loss by noise level and by number of members, likelihood"
    drawn += ", Fréchet distance" if "contenders" in report["quality"] else ""
    lines = [
        f"# {report['members']} members on {report['subject']}",
        "",
        f"{report['data']}. ± is one standard error over rows, of paired differences where two are compared; brackets "
        "are 95 % intervals.",
        "",
        f"![{drawn}](report.png)",
        "",
        "## Verdict",
        "",
        *[f"- {line}" for line in report["verdict"]],
    ]
    for title, notes, table in sections(report):
        lines += ["", f"## {title}"]
        for note in notes:
            lines += ["", note]
        if table is not None:
            lines += ["", *table.markdown()]
    made = report["provenance"]
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    lines += [
        "",
        "## Made by",
        "",
        f"`{made['command']}` on {made['date']}, {made['device']}, {made['threads']} threads",
    ]
    lines[-1] += f", seed {made['seed']}; {versions}. Hashes of the checkpoints are in `report.json`."
    seconds = ", ".join(f"{name} {value}" for name, value in report["seconds"].items())
    lines += ["", f"Seconds of computing in the last run (parts of an earlier one are read): {seconds}.", ""]
    return "\n".join(lines)


def latex(report: dict[str, Any]) -> str:
    """The tables for a paper, with the package booktabs."""
    label = re.sub(r"[^a-z0-9]+", "-", report["subject"].lower())
    tables = [table.latex(label) for _, _, table in sections(report) if table is not None]
    return "\n\n".join(["% \\usepackage{booktabs}", *tables]) + "\n"


def csv(report: dict[str, Any]) -> str:
    """Every number of the tables, one a line: what, of which, value, error or interval."""
    text = io.StringIO()
    writer = table_of.writer(text, lineterminator="\n")
    writer.writerow(["quantity", "of", "value", "error", "low", "high"])

    def add(quantity: str, of: str, found: dict[str, float]) -> None:
        cells = [f"{found[key]:.8g}" if key in found else "" for key in ("value", "error", "low", "high")]
        writer.writerow([quantity, of, *cells])

    loss, bits = report["loss"], report["likelihood"]
    for k, found in enumerate(loss["members"]):
        add("loss", f"member {k}", found)
    for rule, found in loss["rules"].items():
        add("loss", rule, found)
        add("loss against member mean", rule, found["against_member_mean"])
    for rule, sizes in loss["by_size"].items():
        for k, found in sizes.items():
            add(f"loss of {k} members", rule, found)
    add("diversity", "members", loss["diversity"])
    for i, t in enumerate(loss["times"]):
        add(f"diversity at {t:g}", "members", {"value": loss["diversity_by_level"][i]})
        for rule, found in loss["rules"].items():
            add(f"loss at {t:g}", rule, {"value": found["by_level"][i]})
    for k, found in enumerate(bits["members"]):
        add("bits per dimension", f"member {k}", found)
    for k, found in bits["by_size"].items():
        add(f"bits per dimension of {k} members", "mean", found)
    for rule, found in bits["rules"].items():
        add("bits per dimension", rule, found)
    for name, found in report["quality"].get("contenders", {}).items():
        add("frechet distance", name, found["frechet"])
        add("kernel distance", name, found["kernel"])
        if found["score"]:
            add("inception score", name, found["score"])
    dropout = report["mc_dropout"]
    if "loss" in dropout:
        add("loss, dropout network", "off", dropout["loss"]["off"])
        for kind in mc_dropout.MASKS:
            for rule, found in dropout["loss"][kind]["rules"].items():
                add(f"loss, {kind} dropout masks", rule, found)
                add(f"loss, {kind} dropout masks, against off", rule, found["against_off"])
        for name, found in dropout["likelihood"].items():
            add("bits per dimension, dropout network", name, found)
        for name, found in dropout.get("samples", {}).items():
            add("frechet distance, dropout network", name, found["frechet"])
    for name, value in report["cost"]["milliseconds"].items():
        add("milliseconds", name, {"value": value})
    return text.getvalue()
