"""The settings of an ensemble, held to what they may be."""

from typing import Any

from fastens import parameterisation
from fastens.ops._dispatch import check_backend


def check_settings(
    engine: str, backend: str, max_fold: int | None, prediction: Any, aggregate_in: str | None, schedule: Any
) -> dict[str, Any]:
    """The keyword arguments of an ensemble as its settings.

    Raises:
        ValueError: one of them is unknown or out of range, or they contradict each other.
    """
    if engine not in ("auto", "fold", "loop"):
        raise ValueError(f"engine {engine!r} is unknown, expected 'auto', 'fold' or 'loop'")
    check_backend(backend)
    if max_fold is not None and max_fold < 1:
        raise ValueError(f"max_fold is {max_fold}, expected at least one row")
    found, aggregate_in, schedule = parameterisation.resolve(prediction, aggregate_in, schedule)
    return {
        "engine": engine,
        "backend": backend,
        "max_fold": max_fold,
        "prediction": found,
        "aggregate_in": aggregate_in,
        "schedule": schedule,
    }
