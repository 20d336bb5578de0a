"""A sample of random checkpoints; ``python -m tests.io.at_random --draws 2000`` is the whole."""

import pytest

from tests.io import at_random


@pytest.mark.parametrize("block", range(4))
def test_what_is_loaded_is_what_was_asked_for_or_an_error(block, tmp_path):
    found = [outcome for seed in range(30 * block, 30 * block + 30) for outcome in at_random.outcomes(seed, tmp_path)]
    assert set(found) <= {"same", "refused"}
    assert found.count("same") > 0.6 * len(found)


def test_what_differs_is_seen(monkeypatch, tmp_path):
    """The draws beside a reader that takes the first of several sets, and for no average what it has no word for."""
    monkeypatch.setattr("fastens.io.choice._one", lambda _, fitting: fitting[0] if fitting else None)
    monkeypatch.setattr("fastens.io.choice._not_understood", lambda *_: [])
    found = [outcome for seed in range(60) for outcome in at_random.outcomes(seed, tmp_path)]
    assert any(outcome.startswith("draw") for outcome in found)
