"""What an ensemble prints of itself, above the network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastens import _native
from fastens.ops.run_program import available

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
    count, why = len(report.plans), report.why_no_plan or _why_none(ensemble)
    if not count:
        return f"no plan: {why}" if why else "no plan yet: the first call under torch.no_grad() makes one"
    plans = f"{count} plan{'s' if count > 1 else ''}"
    return f"{plans}; none for some calls: {report.why_no_plan}" if report.why_no_plan else plans


def _why_none(ensemble: Ensemble) -> str:
    """Why no call can have a plan, whatever its arguments; empty where one can."""
    backend, kind = ensemble._settings["backend"], ensemble.device.type
    usable = {"cpu": ("auto", "native"), "cuda": ("auto", "triton")}.get(kind, ())
    if not usable:
        return f"plans run on a CPU or a CUDA device, and the ensemble is on {ensemble.device}"
    if backend not in usable:
        return f"backend={backend!r} has none; backend='auto' takes them"
    if kind == "cpu" and not available():
        return f"the compiled library is not loaded: {_native.status()}"
    most = ensemble._settings["max_fold"]
    if most is not None and most < ensemble.num_members:
        return f"calls of more than max_fold={most} rows, members times batch, have none"
    return ""
