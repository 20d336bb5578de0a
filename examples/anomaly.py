"""Which images are not of the kind that a model was trained on: ``python examples/anomaly.py``.

Scores the shipped digits' test images against patches of photographs, grey and averaged to 8x8, under the digits'
members, and the reverse, digits enlarged to 16x16, under the photographs' members; writes the report in
docs/evaluation/anomaly.
"""

import argparse
from pathlib import Path

import torch.nn.functional as F

import fastens
from fastens.demo import member_paths
from fastens.demo.data import load_digits, load_photographs
from fastens.evaluation import Denoiser, anomaly
from fastens.evaluation.anomaly import Anomaly
from fastens.schedules import Discrete

SHOWN = {"ensemble": "mean of the members", "member 0": "one member", "variance": "variance between members"}


def found() -> dict[str, Anomaly]:
    """Both directions."""
    (digits, digits_test), (patches, patches_test) = load_digits(), load_photographs()
    small = F.adaptive_avg_pool2d(patches_test.mean(1, keepdim=True), 8)
    large = F.interpolate(digits_test, size=16, mode="bilinear").expand(-1, 3, -1, -1).contiguous()
    sets = {
        "digits": (digits[:400], digits_test, small),
        "photographs": (patches[:400], patches_test[:200], large[:200]),
    }
    return {
        name: anomaly(Denoiser(fastens.Ensemble(member_paths(name)), Discrete.linear()), *images)
        for name, images in sets.items()
    }


def page(results: dict[str, Anomaly]) -> str:
    """The report in Markdown."""
    lines = [
        "# Images of another kind",
        "",
        "`python examples/anomaly.py` makes this page, from the shipped members: digits against patches of photographs "
        "(grey, averaged to 8x8) under the five members trained on digits, and the reverse (digits enlarged to 16x16). "
        "The score is how far an image's denoising errors at 10 noise levels are from those of training images; AUROC "
        "is the probability that an image of the other kind scores higher, with a 95 % interval.",
        "",
        "![scores of both kinds](report.png)",
        "",
        "| trained on | mean of 5 | the median member alone | variance between members |",
        "|---|---|---|---|",
    ]
    for name, result in results.items():
        values = result.auroc["ensemble"], result.single, result.auroc["variance"]
        lines.append(f"| {name} | " + " | ".join(f"{v.value:.3f} [{v.low:.3f}, {v.high:.3f}]" for v in values) + " |")
    better = [name for name, r in results.items() if r.auroc["ensemble"].low > r.single.high]
    worse = [name for name, r in results.items() if r.auroc["ensemble"].high < r.single.low]
    spread = [name for name, r in results.items() if r.auroc["variance"].low > r.auroc["ensemble"].high]
    lines += [
        "",
        "By intervals that do not meet, the mean of the members detects better than a single member on "
        f"{' and '.join(better) or 'neither'} and worse on {' and '.join(worse) or 'neither'}. The variance between "
        f"members, which the same pass gives, is better than the mean's error on {' and '.join(spread) or 'neither'}.",
        "",
    ]
    return "\n".join(lines)


def draw(results: dict[str, Anomaly], path: Path) -> None:
    """Histograms of the scores."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np
    from matplotlib.ticker import NullLocator

    figure, axes = plt.subplots(len(results), len(SHOWN), figsize=(11, 5.5), constrained_layout=True)
    for row, (name, result) in zip(axes, results.items(), strict=True):
        for axis, (key, label) in zip(row, SHOWN.items(), strict=True):
            pair = result.scores[key]
            edges = np.geomspace(min(map(np.min, pair)), max(map(np.max, pair)), 40)
            for scores, colour, kind in zip(pair, ("tab:blue", "tab:orange"), ("same kind", "other kind"), strict=True):
                axis.hist(scores, edges, color=colour, alpha=0.6, label=kind)
            axis.set(xscale="log", yticks=[])
            axis.set_title(f"trained on {name}: {label}\nAUROC {result.auroc[key].value:.3f}", fontsize=9)
            axis.set_xticks((0.5, 1, 2, 4), ("0.5", "1", "2", "4"))
            axis.xaxis.set_minor_locator(NullLocator())
            axis.spines[["top", "right", "left"]].set_visible(False)
    axes[0, 0].legend(fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("score")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    """Write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/evaluation/anomaly"))
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    results = found()
    draw(results, out / "report.png")
    (out / "report.md").write_text(page(results))


if __name__ == "__main__":
    main()
