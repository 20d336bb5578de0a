"""The GPU table: ``python -m bench.gpu_table table DIR`` prints that of a folder of results.

``keep DIR`` makes them the latest of their device, ``bench/results/<device>.json``, writes the table of
``docs/benchmarks.md`` from all that are kept, and makes the ways that were measured there those that the wheel ships
for the device.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
MEASURED = ROOT / "fastens" / "ops" / "measured"
BEGIN, END = "<!-- GPU table: python -m bench.gpu_table keep DIR -->", "<!-- end of GPU table -->"
ONCE = ("first call, s", "capture, s", "peak, GiB")
WHERE = ("device", "driver", "cuda", "cudnn", "torch", "triton", "commit")
NOT_MEASURED = "No GPU has run the benchmarks yet, so there are no figures."


def read(folder):
    """The results in a folder of one file per question, in the order of the goals."""
    rows = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
    rows = [row for row in rows if "seconds" in row]
    if not rows:
        raise SystemExit(f"{folder} holds no results; run bench/gpu.sh {folder}")
    return sorted(rows, key=lambda row: (row["goal"] or "G9", row["shape"]))


def table(rows):
    """One line per question and rival; a goal that is missed is marked, a rival that did not run says why."""
    lines = [
        ", ".join(f"{key} {rows[0][key]}" for key in WHERE if key in rows[0]),
        "",
        "| goal | question | rival | ours, ms | rival, ms | ratio | wanted |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ours = row["seconds"]["ours"][1]
        head = f"| {row['goal']} | {row['shape']} |"
        for rival, (_, theirs, _) in row["seconds"].items():
            if rival == "ours":
                continue
            goal = row["wanted"].get(rival)
            verdict = "" if goal is None else f"{goal:g}{'' if theirs / ours >= goal else ', missed'}"
            lines.append(f"{head} {rival} | {1e3 * ours:.3f} | {1e3 * theirs:.3f} | {theirs / ours:.2f} | {verdict} |")
        if "flops" in row:
            lines.append(f"{head} | {1e3 * ours:.3f} | | | {row['flops'] / ours / 1e12:.1f} TFLOP/s |")
        once = [f"{name.partition(',')[0]} {row[name]:.2f} {name.rpartition(' ')[2]}" for name in ONCE if name in row]
        if once:
            lines.append(f"{head} {'; '.join(once)} | | | | |")
        lines += [f"{head} {rival} | | {why.replace('|', ' ')} | | |" for rival, why in row["failed"].items()]
    return "\n".join(lines)


def keep(folder, results=RESULTS, measured=MEASURED):
    """Keep a folder of results, and the ways measured with them, as the latest of their device; a rehearsal is none."""
    rows = read(folder)
    devices = {row["device"] for row in rows}
    if len(devices) != 1 or any("rehearsal" in device for device in devices):
        raise SystemExit(f"{folder} holds results of {', '.join(sorted(devices))}, expected those of one GPU")
    incomplete = [row["name"] for row in rows if not row["complete"]]
    if incomplete:
        raise SystemExit(f"not complete: {', '.join(incomplete)}; run bench/gpu.sh {folder} again")
    device = devices.pop()
    name = re.sub(r"[^a-z0-9]+", "-", device.lower())
    choices = Path(folder) / "choices.json"
    if choices.exists():
        measured.mkdir(parents=True, exist_ok=True)
        found = {device: json.loads(choices.read_text())[device]}
        (measured / f"{name}.json").write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"{name}.json"
    path.write_text(json.dumps(rows, indent=1) + "\n")
    return path


def section(results=RESULTS):
    """What stands between the page's marks: a table per device that has results."""
    kept = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    return "\n\n".join(table(rows) for rows in kept) or NOT_MEASURED


def written(text, content):
    """The page's text with ``content`` between its marks."""
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"docs/benchmarks.md has no {BEGIN!r} followed by {END!r}")
    return f"{before}{BEGIN}\n{content}\n{END}{after}"


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("table", "keep"):
        sys.exit("usage: python -m bench.gpu_table table|keep DIR")
    if sys.argv[1] == "table":
        print(table(read(sys.argv[2])))
    else:
        print(keep(sys.argv[2]))
        page = ROOT / "docs" / "benchmarks.md"
        page.write_text(written(page.read_text(), section()))
