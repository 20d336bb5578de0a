"""What an ensemble prints of itself, above the network."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastens.ensemble import Ensemble


def summary(ensemble: Ensemble) -> str:
    """Two lines: members, rule, engine, dtype and device; and the plans, or why there is none."""
    if "network" not in ensemble._modules:  # an error message may show one that is being made
        return ""
    tensors = [*ensemble.parameters(), *ensemble.buffers()]
    where = f"{ensemble.dtype} on {ensemble.device}" if any(t.is_floating_point() for t in tensors) else "no weights"
    engine = "" if ensemble.engine == "fold" else ", one by one"
    first = f"{ensemble.num_members} members, rule={ensemble.rule}, engine={ensemble.engine!r}{engine}, {where}"
    return f"{first}\n{_plans(ensemble)}"


def _plans(ensemble: Ensemble) -> str:
    report = ensemble.report()
    if report.engine == "loop":
        return f"no plan: the members are called one by one, {report.why}"
    count, why = len(report.plans), report.why_no_plan
    if not count:
        return f"no plan: {why}" if why else "no plan yet: the first call under torch.no_grad() makes one"
    plans = f"{count} plan{'s' if count > 1 else ''}"
    return f"{plans}; the last call without one: {why}" if why else plans
