"""One report on an ensemble: loss, likelihood, sample quality, diversity, cost, and a verdict."""

from __future__ import annotations

import dataclasses
import itertools
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastens import rules
from fastens.distributed.jobs import Job
from fastens.ensemble import Ensemble
from fastens.evaluation import mc_dropout
from fastens.evaluation.denoiser import Denoiser, check_data
from fastens.evaluation.likelihood import Likelihood, likelihood
from fastens.evaluation.loss import DenoisingLoss, Estimate, denoising_loss, level_weights, subsets_of
from fastens.evaluation.progress import Bars
from fastens.evaluation.quality import check_enough, features, quality
from fastens.evaluation.results import Parts
from fastens.evaluation.sampling import sample
from fastens.evaluation.subjects import Subject
from fastens.evaluation.weights import fit_weights, held_out_gain
from fastens.files import write_json, write_whole
from fastens.provenance import provenance

LOSS_RULES = ("mean", "geometric", "median", "dominant", "max_abs", "sum", "alternating", "mixture")
LIKELIHOOD_RULES = ("mean", "geometric", "dominant")
SAMPLE_RULES = ("mean", "geometric", "median", "dominant")
# Arrays of a loss that are kept under their names.
_WHOLE = ("times", "log_snr", "level_weights", "members", "diversity", "gram")


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is computed.

    Attributes:
        rows: test rows of the loss.
        noise_levels: noise levels of the loss.
        likelihood_rows: test rows of the likelihood.
        ode_steps: Runge-Kutta steps of the likelihood, four evaluations each.
        samples: per rule and per member.
        sampler_steps: of a sample.
        batch: rows at a time.
        most_subsets: the most smaller ensembles of each size.
        seed: of all noise.
        progress: show progress bars.
    """

    rows: int = 400
    noise_levels: int = 20
    likelihood_rows: int = 400
    ode_steps: int = 24
    samples: int = 1000
    sampler_steps: int = 50
    batch: int = 64
    most_subsets: int = 10
    seed: int = 0
    progress: bool = True


QUICK = {
    "rows": 96,
    "noise_levels": 10,
    "likelihood_rows": 24,
    "ode_steps": 6,
    "samples": 128,
    "sampler_steps": 15,
    "most_subsets": 4,
}


def evaluate(subject: Subject, out: Path, plan: Plan) -> dict[str, Any]:
    """Evaluate and write ``report.json``, ``.csv``, ``.md``, ``.tex`` and ``.png`` into ``out``.

    Finished parts are kept in ``out/parts``: an interrupted run, started again, goes on, and the ranks of a job share
    those of likelihood and samples. The first one writes.

    Returns:
        What is in ``report.json``.

    Raises:
        ValueError: data out of range, members whose rules cannot be evaluated.
        OSError: a folder that cannot be written.
    """
    from fastens.evaluation import tables
    from fastens.evaluation.plots import draw

    check_data("data", subject.test)
    check_data("training data", subject.fit)
    if subject.features is not None:
        width = features(subject.features, subject.test[:2]).shape[1]
        check_enough("generated", plan.samples, width)
        check_enough("real", len(subject.test), width)
    cache = out / "parts"
    denoiser = Denoiser(subject.ensemble, subject.schedule, subject.prediction)
    seconds: dict[str, float] = {}
    report: dict[str, Any] = {"subject": subject.name, "data": subject.data, "members": subject.ensemble.num_members}
    report["settings"] = {**dataclasses.asdict(plan), "schedule": repr(subject.schedule), "features": subject.note}
    del report["settings"]["progress"]
    stages = {"loss": _loss, "likelihood": _likelihood, "quality": _quality, "mc_dropout": _mc_dropout, "cost": _cost}
    for number, (name, stage) in enumerate(stages.items(), 1):
        begun = time.perf_counter()
        report[name] = stage(subject, denoiser, plan, cache, Bars(f"{number}/{len(stages)} {name}", plan.progress))
        seconds[name] = round(time.perf_counter() - begun, 1)
    if not Job().first:  # the parts that it made are there
        return report
    report["seconds"] = seconds
    report["provenance"] = provenance(subject.checkpoints, device=subject.ensemble.device, seed=plan.seed)
    report["threads"] = torch.get_num_threads()
    report["load"] = os.getloadavg()[0]
    report["verdict"] = tables.verdict(report)
    write_json(out / "report.json", report)
    write_whole(out / "report.csv", tables.csv(report))
    write_whole(out / "report.md", tables.markdown(report))
    write_whole(out / "report.tex", tables.latex(report))
    draw(report, out / "report.png")
    return report


def _of(estimate: Estimate) -> dict[str, float]:
    return {"value": estimate.value, "error": estimate.error}


def _errors(differences: np.ndarray) -> list[float]:
    """Standard errors over rows of [N, L]."""
    return (differences.std(0, ddof=1) / len(differences) ** 0.5).tolist()


def _cached_loss(
    denoiser: Denoiser, data: Tensor, plan: Plan, cache: Path, bars: Bars, **options: Any
) -> DenoisingLoss:
    """The loss, read from an earlier run where it is there whole."""
    settings = {**options, "levels": plan.noise_levels, "seed": plan.seed, "most": plan.most_subsets, "kind": "loss"}
    parts = Parts.of(cache, denoiser, data=data, settings=settings)
    kept = parts.read("loss")
    if kept is None:
        loss = denoising_loss(
            denoiser,
            data,
            times=plan.noise_levels,
            most_subsets=plan.most_subsets,
            batch_size=plan.batch,
            seed=plan.seed,
            progress=bars.next(),
            **options,
        )
        kept = {name: getattr(loss, name) for name in _WHOLE}
        kept |= {f"rule {name}": values for name, values in loss.rules.items()}
        kept |= {f"size {name} {k}": values for name, sizes in loss.by_size.items() for k, values in sizes.items()}
        parts.write("loss", kept)
    by_size: dict[str, dict[int, np.ndarray]] = {}
    for key in kept:
        if key.startswith("size "):
            _, name, k = key.split(" ")
            by_size.setdefault(name, {})[int(k)] = kept[key]
    return DenoisingLoss(
        **{name: kept[name] for name in _WHOLE},
        rules={key.removeprefix("rule "): kept[key] for key in kept if key.startswith("rule ")},
        by_size=by_size,
    )


def _loss(subject: Subject, denoiser: Denoiser, plan: Plan, cache: Path, bars: Bars) -> dict[str, Any]:
    bars.total = 2
    sizes = ("mean", "geometric", "median")
    loss = _cached_loss(denoiser, subject.test[: plan.rows], plan, cache, bars, rule_names=LOSS_RULES, by_size=sizes)
    best = loss.members[loss.best_member]
    found: dict[str, Any] = {
        "times": loss.times.tolist(),
        "rows": loss.diversity.shape[0],
        "members": [_of(loss.estimate(member)) for member in loss.members],
        "member_mean": _of(loss.estimate(loss.member_mean)),
        "member_mean_by_level": loss.member_mean.mean(0).tolist(),
        "best_member": {"member": loss.best_member, **_of(loss.estimate(best))},
        "rules": {},
        "diversity": _of(loss.estimate(loss.diversity)),
        "diversity_by_level": loss.diversity.mean(0).tolist(),
        "gain_of_mean": -loss.compare("mean").value,
        "identity_gap": loss.identity_gap(),
        "by_size": {
            name: {str(k): _of(loss.estimate(values)) for k, values in sorted(sizes.items())}
            for name, sizes in loss.by_size.items()
        },
    }
    for name, values in loss.rules.items():
        found["rules"][name] = {
            **_of(loss.estimate(values)),
            "against_member_mean": _of(loss.compare(name)),
            "against_best_member": _of(loss.compare(name, best)),
            "by_level": values.mean(0).tolist(),
            "by_level_error": _errors(values - loss.member_mean),
        }
    for weighting in ("likelihood", "edm"):
        sigma_data = float(subject.fit.std())
        weights = level_weights(denoiser, torch.from_numpy(loss.times), weighting, sigma_data)
        other = dataclasses.replace(loss, level_weights=weights)
        found[f"against_member_mean_{weighting}"] = {name: _of(other.compare(name)) for name in loss.rules}
    fitting = _cached_loss(denoiser, subject.fit[: plan.rows], plan, cache, bars)
    found["weights"] = {}
    for constraint in ("simplex", "affine"):
        fitted = fit_weights(fitting, constraint=constraint)
        gain = {"fit": _of(held_out_gain(fitted, fitting)), "held_out": _of(held_out_gain(fitted, loss))}
        found["weights"][constraint] = {"rule": fitted.to_dict(), **gain}
    return found


def _likelihood(subject: Subject, _: Denoiser, plan: Plan, cache: Path, bars: Bars) -> dict[str, Any]:
    data, total = subject.test[: plan.likelihood_rows], subject.ensemble.num_members
    members = list(subject.ensemble.members)

    def bits(subset: tuple[int, ...], rule: str) -> Likelihood:
        chosen = subject.ensemble if len(subset) == total else Ensemble([members[k] for k in subset])
        return _bits(chosen, rule, subject, plan, cache, bars)

    whole = tuple(range(total))
    by_size: dict[int, np.ndarray] = {}
    sizes = sorted({min(2**i, total) for i in range(1, total + 1)})  # doubling, each member in one ensemble of a size
    bars.total = total + sum(total // size for size in sizes) + len(LIKELIHOOD_RULES)
    alone = [bits((k,), "mean") for k in whole]
    by_size[1] = np.mean([found.rows for found in alone], 0)
    for size in sizes:
        by_size[size] = np.mean([bits(s, "mean").rows for s in subsets_of(total, size, total // size)], 0)
    best = min(alone, key=lambda found: found.mean)
    found: dict[str, Any] = {
        "rows": len(data),
        "how": "uniform dequantisation, one Rademacher probe, rk4",
        "members": [{"value": one.mean, "error": one.error} for one in alone],
        "best_member": best.mean,
        "by_size": {str(size): _row_estimate(rows) for size, rows in by_size.items()},
        "evaluations": sum(alone[0].evaluations) // len(alone[0].evaluations),
        "rules": {},
    }
    for rule in LIKELIHOOD_RULES:
        rows = bits(whole, rule).rows
        found["rules"][rule] = {
            **_row_estimate(rows),
            "against_member_mean": _row_estimate(rows - by_size[1]),
            "against_best_member": _row_estimate(rows - best.rows),
            "rows_better_than_member_mean": float((rows < by_size[1]).mean()),
        }
    return found


def _bits(model: Ensemble, rule: str, subject: Subject, plan: Plan, cache: Path, bars: Bars) -> Likelihood:
    before, model.rule = model.rule, rules.get(rule)
    try:
        return likelihood(
            Denoiser(model, subject.schedule, subject.prediction),
            subject.test[: plan.likelihood_rows],
            levels=subject.levels,
            method="rk4",
            steps=plan.ode_steps,
            batch_size=plan.batch,
            seed=plan.seed,
            cache=cache,
            progress=bars.next(),
        )
    finally:
        model.rule = before


def _row_estimate(rows: np.ndarray) -> dict[str, float]:
    return {"value": float(rows.mean()), "error": float(rows.std(ddof=1) / len(rows) ** 0.5)}


def _quality(subject: Subject, _: Denoiser, plan: Plan, cache: Path, bars: Bars) -> dict[str, Any]:
    if subject.features is None:
        return {"note": subject.note}
    members = list(subject.ensemble.members)
    contenders: list[tuple[str, Any, str]] = [(rule, subject.ensemble, rule) for rule in SAMPLE_RULES]
    contenders += [(f"member {k}", Ensemble([member]), "mean") for k, member in enumerate(members)]
    bars.total = len(contenders)
    before, found = subject.ensemble.rule, {}
    for name, model, rule in contenders:
        model.rule = rule
        found[name] = _judged(model, subject, plan, cache, bars)
    subject.ensemble.rule = before
    real = features(subject.features, subject.test)
    floor = _plain(quality(features(subject.features, subject.fit), real, seed=plan.seed))
    return {"note": subject.note, "contenders": found, "training_images": floor}


def _judged(model: Ensemble, subject: Subject, plan: Plan, cache: Path, bars: Bars) -> dict[str, Any]:
    """The quality of a model's samples, which all start from the same noise."""
    images = sample(
        Denoiser(model, subject.schedule, subject.prediction),
        plan.samples,
        tuple(subject.test.shape[1:]),
        steps=plan.sampler_steps,
        batch_size=plan.batch,
        seed=plan.seed,
        cache=cache,
        progress=bars.next(),
    )
    extract = subject.features
    assert extract is not None
    logits = None if subject.logits is None else features(subject.logits, images)
    real = features(extract, subject.test)
    return _plain(quality(features(extract, images), real, logits=logits, seed=plan.seed))


def _mc_dropout(subject: Subject, _: Denoiser, plan: Plan, cache: Path, bars: Bars) -> dict[str, Any]:
    if subject.dropout is None:
        return {"note": subject.dropout_note}
    models = mc_dropout.contenders(subject.dropout, subject.ensemble.num_members)
    bars.total = len(models) + (2 if subject.features is None else 4)
    losses = {
        name: _cached_loss(
            Denoiser(model, subject.schedule, subject.prediction),
            subject.test[: plan.rows],
            plan,
            cache,
            bars,
            rule_names=("mean",) if name == "off" else mc_dropout.RULES,
        )
        for name, model in models.items()
    }
    off = losses["off"]
    alone = off.members[0]
    found: dict[str, Any] = {
        "note": subject.dropout_note,
        "p": mc_dropout.probabilities(subject.dropout),
        "masks": subject.ensemble.num_members,
        "loss": {"off": _of(off.estimate(alone))},
    }
    for kind in mc_dropout.MASKS:
        loss = losses[kind]
        one = loss.member_mean
        found["loss"][kind] = {
            "one": _of(loss.estimate(one)),
            "one_off": _of(loss.estimate(one - alone)),
            "rules": {
                rule: {
                    **_of(loss.estimate(values)),
                    "against_off": _of(loss.compare(rule, alone)),
                    "against_one": _of(loss.compare(rule)),
                }
                for rule, values in loss.rules.items()
            },
        }
    rows = {name: _bits(models[name], "mean", subject, plan, cache, bars).rows for name in ("off", "fixed")}
    found["likelihood"] = {name: _row_estimate(values) for name, values in rows.items()}
    found["likelihood"]["against_off"] = _row_estimate(rows["fixed"] - rows["off"])
    if subject.features is not None:
        found["samples"] = {name: _judged(models[name], subject, plan, cache, bars) for name in ("off", "fixed")}
    return found


def _plain(value: Any) -> dict[str, Any]:
    return dataclasses.asdict(value)


def _cost(subject: Subject, denoiser: Denoiser, plan: Plan, _: Path, __: Bars) -> dict[str, Any]:
    """Milliseconds of one evaluation of a batch, rounds interleaved, medians: by rule, of one member, of a loop."""
    x = torch.randn(plan.batch, *subject.test.shape[1:], generator=torch.Generator().manual_seed(plan.seed))
    x = x.to(denoiser.device)
    t = torch.tensor(0.5 * (subject.schedule.t_data + subject.schedule.t_prior), dtype=torch.float64)
    single = [Denoiser(Ensemble([m]), subject.schedule, subject.prediction) for m in subject.ensemble.members]
    runs: dict[str, Any] = {"one member": lambda: single[0].epsilon(x, t)}
    runs["members one by one"] = lambda: [one.epsilon(x, t) for one in single]

    def by(rule: str) -> None:
        subject.ensemble.rule = rule
        with subject.ensemble.trajectory(len(x), torch.Generator().manual_seed(0)):
            denoiser.epsilon(x, t)

    for rule in LOSS_RULES:
        runs[rule] = lambda rule=rule: by(rule)
    before, took = subject.ensemble.rule, {name: [] for name in runs}
    with torch.no_grad():
        for turn, (name, run) in itertools.product(range(6), runs.items()):
            begun = time.perf_counter()
            run()
            if turn:
                took[name].append(1e3 * (time.perf_counter() - begun))
    subject.ensemble.rule = before
    return {"batch": plan.batch, "milliseconds": {name: float(np.median(values)) for name, values in took.items()}}
