"""``python -m fastens.composition``: the report on compositions."""

import argparse
from pathlib import Path

from fastens.composition.report import write_report


def main() -> None:
    """Write the report."""
    parser = argparse.ArgumentParser(prog="python -m fastens.composition", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/evaluation/composition"), help="folder of the report")
    parser.add_argument("--samples", type=int, default=4096, help="of each run")
    parser.add_argument("--steps", type=int, default=150, help="of each run")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each way")
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 8, 32], help="dimensions")
    given = parser.parse_args()
    write_report(given.out, given.samples, given.steps, given.seeds, given.sizes)


if __name__ == "__main__":
    main()
