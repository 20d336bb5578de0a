"""Does MC Dropout pay: one network under K sets of dropout masks, against the same network with dropout off."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastens.dropout import MCDropout
from fastens.ensemble import Ensemble
from fastens.evaluation.table import Table

RULES = ("mean", "geometric", "median")
MASKS = ("fixed", "fresh")


def probabilities(network: nn.Module) -> list[float]:
    """The probabilities of the network's dropout layers, without repetition, rising."""
    return sorted({m.p for m in network.modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0})


def contenders(network: nn.Module, num_members: int) -> dict[str, Ensemble]:
    """The network with dropout off, and under fixed and fresh masks, by name."""
    return {"off": Ensemble([network]), **{kind: MCDropout(network, num_members, masks=kind) for kind in MASKS}}


def verdict(found: dict[str, Any]) -> str:
    """A sentence on the loss, the likelihood and the samples under masks, each against dropout off."""
    if "loss" not in found:
        return f"MC Dropout: not judged; {found['note']}."
    loss = found["loss"]
    best = min(("fixed", "fresh"), key=lambda kind: loss[kind]["rules"]["mean"]["value"])
    against = loss[best]["rules"]["mean"]["against_off"]
    pays = against["value"] < -2 * against["error"]
    bits = found["likelihood"]["against_off"]
    words = "pays" if pays else "does not pay"
    sentence = (
        f"MC Dropout (p = {', '.join(f'{p:g}' for p in found['p'])}, mean of {found['masks']} {best} masks) {words}: "
        f"against dropout off its loss differs by {against['value']:+.5f} ± {against['error']:.5f}, its bits/dim "
        f"(fixed masks) by {bits['value']:+.3f} ± {bits['error']:.3f}"
    )
    if "samples" in found:
        off, fixed = (found["samples"][name]["frechet"] for name in ("off", "fixed"))
        sentence += f", and its samples' Fréchet distance is {fixed['value']:.3g} against {off['value']:.3g}"
    return f"{sentence}; one evaluation takes {found['masks']} passes."


def notes(found: dict[str, Any]) -> list[str]:
    """What is said of the section's table."""
    if "loss" not in found:
        return [f"Not judged: {found['note']}."]
    bits = found["likelihood"]
    said = [
        f"{found['note'][:1].upper()}{found['note'][1:]}; p = {', '.join(f'{p:g}' for p in found['p'])}, "
        f"{found['masks']} sets of masks, on the rows and noise of the tables above.",
        f"Bits/dim: {bits['off']['value']:.4f} with dropout off, {bits['fixed']['value']:.4f} under fixed masks "
        f"({bits['against_off']['value']:+.4f} ± {bits['against_off']['error']:.4f}); fresh masks make no field that "
        "an ODE solver could integrate.",
    ]
    if "samples" in found:
        off, fixed = (_interval(found["samples"][name]["frechet"]) for name in ("off", "fixed"))
        said.append(f"Fréchet distance of samples: {off} with dropout off, {fixed} under fixed masks.")
    return said


def table(found: dict[str, Any]) -> Table | None:
    """Return the table of losses under dropout masks, None if that part was not run."""
    if "loss" not in found:
        return None
    loss = found["loss"]
    rows = [["off", "", f"{loss['off']['value']:.5f}", "", ""]]
    for kind in MASKS:
        one = loss[kind]
        rows.append([kind, "one set", f"{one['one']['value']:.5f}", _signed(one["one_off"]), ""])
        rows += [
            [kind, rule, f"{values['value']:.5f}", _signed(values["against_off"]), _signed(values["against_one"])]
            for rule, values in one["rules"].items()
        ]
    head = ["masks", "rule", "denoising loss", "against dropout off", "against one set of masks"]
    return Table("MC Dropout", head, rows)


def _interval(found: dict[str, float]) -> str:
    return f"{found['value']:.3g} [{found['low']:.3g}, {found['high']:.3g}]"


def _signed(difference: dict[str, float]) -> str:
    return f"{difference['value']:+.5f} ± {difference['error']:.5f}"
