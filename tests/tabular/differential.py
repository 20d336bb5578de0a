"""Packed forests beside the libraries themselves: ``python -m tests.tabular.differential --draws 10000 --seed 1``.

A draw is a fitted model of any kind that the readers take, and a table in any container. Both answers agree, or both
are refused; where only the library answers, the refusal says what to pass instead. Equal means to the last bit for
scikit-learn and LightGBM; XGBoost adds its leaves in float32, so that its sums are rounded otherwise.
"""

import argparse
import collections
import itertools
import sys
import warnings

import numpy as np
import pandas as pd

from fastens.tabular.drop_in import _packed, accelerate
from tests.tabular.containers import contained, values
from tests.tabular.models import LIBRARIES, choice, of_forest_diffusion

TABLES = 5  # of a model
REMEDIES = ("pass", "convert", "call", "expected", "only", "train", "encode")
KNOWN = ("same", "both refuse", "refused", "no model", "model refused")


def answer(predict):
    """What a call returns, or the error that it raises."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        try:
            return predict()
        except Exception as error:  # of any library
            return error


def names_of(model, width):
    for source in (model, getattr(model, "_Booster", None)):
        for attribute in ("feature_names_in_", "feature_names"):
            names = answer(lambda source=source, attribute=attribute: list(getattr(source, attribute)))
            if isinstance(names, list):
                return names
    return [f"feature {i}" for i in range(width)]


def largest_sum(forest):
    """Of magnitudes that a row can add up: the largest leaf of every tree, and the base."""
    first = np.cumsum(forest.trees.feature < 0)[forest.trees.offsets[1:] - 1]
    leaves = np.split(np.abs(forest.trees.values).max(1), first[:-1])
    return sum(leaf.max() for leaf in leaves) + np.abs(forest._base).max()


def verdict(library, forest, expected, actual):
    """ "same", "both refuse", "refused" with a remedy, or what differs."""
    if isinstance(expected, Exception):
        if isinstance(actual, Exception):
            return "both refuse" if isinstance(actual, ValueError | TypeError) else f"raises {actual!r}"
        return "both refuse" if not actual.size else f"answers where the library raises {expected!r:.200}"
    if isinstance(actual, Exception):
        helpful = isinstance(actual, ValueError | TypeError) and any(word in str(actual) for word in REMEDIES)
        return "refused" if helpful else f"raises {actual!r:.300} where the library answers"
    if not actual.size and not expected.size:
        return "same"  # XGBoost gives no row of several outputs in another shape
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return f"{actual.dtype} {actual.shape}, expected {expected.dtype} {expected.shape}"
    if library == "xgboost":
        bound = (forest.trees.num_trees + 2) * 2.0**-23 * largest_sum(forest)
        equal = bool((np.abs(actual.astype(float) - expected) <= bound).all())
    else:
        equal = np.array_equal(actual, expected)
    return "same" if equal else f"differs by {np.abs(actual - expected).max()}"


def run(seed, number, only=None):
    """Draw ``number`` models; yield (draw, library, container, verdict) of each table."""
    for draw in range(number) if only is None else [only]:
        rng = np.random.default_rng([seed, draw])
        library = choice(rng, list(LIBRARIES))
        drawn = answer(lambda: choice(rng, LIBRARIES[library])(rng))  # noqa: B023
        if isinstance(drawn, Exception):
            yield draw, library, "no table", "no model"  # the library itself does not fit these data by these options
            continue
        x, models, pack, predict = drawn
        forest = answer(pack)
        if isinstance(forest, Exception):
            helpful = isinstance(forest, ValueError | TypeError) and any(word in str(forest) for word in REMEDIES)
            yield draw, library, "no table", "model refused" if helpful else f"packing raises {forest!r:.300}"
            continue
        names = names_of(models[0], x.shape[1])
        for _ in range(TABLES):
            container, table = contained(rng, values(rng, x, forest), names)
            yield draw, library, container, compared(library, models, forest, predict, table)


def run_forest_diffusion(seed, number):
    """The same of models of ForestDiffusion, beside the package's prediction of every label, level and column."""
    for draw in range(number):
        rng = np.random.default_rng([seed, draw, 1])
        model = of_forest_diffusion(rng)
        fast = accelerate(model)
        for label, levels in enumerate(model.regr):
            for level, models in enumerate(levels):
                for column, of_column in enumerate(models) if isinstance(models, list) else [(None, models)]:
                    rows = rng.normal(size=(20, model.c))
                    if model.model == "xgboost":
                        rows[rng.random(rows.shape) < 0.1] = np.nan
                    call = {"X": rows, "i": level, "j": label, "k": column, "dmat": model.n_batch > 0}
                    forest, library = _packed(of_column), type(of_column).__module__.partition(".")[0]
                    expected, actual = (answer(lambda m=m, call=call: m.predict_over_c(**call)) for m in (model, fast))
                    yield draw, library, "ForestDiffusion", verdict(library, forest, expected, actual)


def compared(library, models, forest, predict, table):
    """The verdict on one table: of the prediction, or of several members' where there are several models."""
    expected = [answer(lambda model=model: predict(model, table)) for model in models]
    failed = next((each for each in expected if isinstance(each, Exception)), None)
    if len(models) == 1:
        return verdict(library, forest, expected[0], answer(lambda: forest.predict(table)))
    stacked = (
        failed if failed is not None else np.stack([each.reshape(len(each), forest.num_outputs) for each in expected])
    )
    return verdict(library, forest, stacked, answer(lambda: forest.predict_members(table)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--draws", type=int, default=1000, help="tables, five of each model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--models", type=int, default=20, help="of ForestDiffusion")
    parser.add_argument("--only", type=int, help="one model, again")
    options = parser.parse_args()
    counts, different, refused = collections.Counter(), 0, collections.Counter()
    drawn = run(options.seed, -(-options.draws // TABLES), options.only)
    for draw, library, container, outcome in itertools.chain(drawn, run_forest_diffusion(options.seed, options.models)):
        known = outcome in KNOWN
        counts[library, outcome if known else "different"] += 1
        refused[library, container] += outcome == "refused"
        if not known or options.only is not None:
            different += not known
            print(f"draw {draw}, {library}, {container}: {outcome}", flush=True)
    for key, count in sorted(counts.items()):
        print(*key, count)
    print("refused:", {" ".join(key): count for key, count in sorted(refused.items()) if count})
    print(f"{sum(counts.values())} tables, {different} different; pandas {pd.__version__}, numpy {np.__version__}")
    sys.exit(different > 0)


if __name__ == "__main__":
    main()
