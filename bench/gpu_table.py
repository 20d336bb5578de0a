"""The GPU table of a folder of results: ``python -m bench.gpu_table DIR`` prints Markdown."""

import json
import sys
from pathlib import Path


def table(folder):
    """One line per question and rival; a goal that is missed is marked, a rival that did not run says why."""
    rows = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
    rows = [row for row in rows if "seconds" in row]
    if not rows:
        raise SystemExit(f"{folder} holds no results; run bench/gpu.sh {folder}")
    first = rows[0]
    where = ", ".join(f"{key} {first[key]}" for key in ("device", "driver", "cuda", "torch", "commit") if key in first)
    lines = [
        where,
        "",
        "| goal | question | rival | ours, ms | rival, ms | ratio | wanted |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ours = row["seconds"]["ours"][1]
        compared = {name: values[1] for name, values in row["seconds"].items() if name != "ours"}
        wanted = dict(row["wanted"])
        if "copy seconds" in row:
            compared["copy of as many bytes"] = row["copy seconds"]
            wanted["copy of as many bytes"] = row["wanted of copy"]
        for rival, theirs in compared.items():
            goal = wanted.get(rival)
            verdict = "" if goal is None else f"{goal:g}{'' if theirs / ours >= goal else ', missed'}"
            lines.append(
                f"| {row['goal']} | {row['shape']} | {rival} | {1e3 * ours:.3f} | {1e3 * theirs:.3f} "
                f"| {theirs / ours:.2f} | {verdict} |"
            )
        lines += [f"| {row['goal']} | {row['shape']} | {rival} | | {why} | | |" for rival, why in row["failed"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(sys.argv[1]))
