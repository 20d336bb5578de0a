"""A sample of the differential suite; ``python -m tests.tabular.differential --draws 10000`` is the whole."""

import numpy as np
import pytest

pytest.importorskip("xgboost")
pytest.importorskip("lightgbm")

from tests.tabular import differential


@pytest.mark.parametrize("seed", range(4))
def test_a_packed_forest_answers_as_its_library_does(seed):
    outcomes = list(differential.run(seed, 25))
    different = [draw for draw in outcomes if draw[-1] not in differential.KNOWN]
    assert not different
    assert sum(draw[-1] == "same" for draw in outcomes) >= len(outcomes) / 3


def test_models_of_forest_diffusion_answer_as_the_package_does():
    pytest.importorskip("ForestDiffusion.diffusion_with_trees_class", exc_type=ImportError)
    outcomes = list(differential.run_forest_diffusion(0, 5))
    assert {outcome for *_, outcome in outcomes} == {"same"}
    assert len(outcomes) > 20


def test_what_differs_is_seen(monkeypatch):
    """The suite beside a reader that loses what tells LightGBM's zeros and XGBoost's missing entries apart."""
    monkeypatch.setattr(
        "fastens.tabular.inputs._dense", lambda matrix, absent: np.asarray(matrix.todense(), np.float32)
    )
    outcomes = {outcome for *_, outcome in differential.run(1, 60)}
    assert any(outcome.startswith("differs by") for outcome in outcomes)
