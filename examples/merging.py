"""Merging along one run and across seeds: ``python examples/merging.py`` writes docs/evaluation/merging.

A shipped digit network is trained on at a constant learning rate, and its snapshots are merged; then the five shipped
members, of different seeds, are merged, and their ensemble is distilled into a student.
"""

import argparse
import functools
import inspect
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import fastens
from fastens.demo import member_paths
from fastens.demo.data import load_digits
from fastens.demo.train import make_scheduler, noisy_batch
from fastens.evaluation.merging import merge_study
from fastens.evaluation.merging_report import write
from fastens.provenance import provenance
from fastens.schedules import Discrete

LEARNING_RATE = 1e-3


def continued(count: int, apart: int) -> list[torch.nn.Module]:
    """Snapshots of a run that goes on from the first shipped member."""
    (network,) = fastens.load_members(member_paths("digits")[:1])
    network.train()
    train, _ = load_digits()
    scheduler, generator = make_scheduler(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE)
    snapshots = []
    for number in range(1, count * apart + 1):
        noisy, t, noise = noisy_batch(train, scheduler, generator)
        optimizer.zero_grad()
        F.mse_loss(network(noisy, t).sample, noise).backward()
        optimizer.step()
        if number % apart == 0:
            snapshots.append(fastens.merge([network], [1.0]))  # a copy
    return snapshots


def main(
    out: Path, snapshots: int = 8, apart: int = 100, rows: int = 397, levels: int = 20, student: int = 4000
) -> None:
    """Write the report."""
    begun = time.process_time()
    train, test = load_digits()
    study = functools.partial(
        merge_study, fit=train, test=test[:rows], schedule=Discrete.linear(), times=levels, fit_rows=rows, progress=True
    )
    studies = {
        "snapshots of one run": study(continued(snapshots, apart)),
        "members of five seeds": study(fastens.load_members(member_paths("digits")), student_steps=student),
    }
    minutes = (time.process_time() - begun) / 60
    options = f"--snapshots {snapshots} --apart {apart} --rows {rows} --levels {levels} --student {student}"
    distilled = " The student begins as the best member and learns what the ensemble predicts of noisy training images."
    intro = (
        f"`python examples/merging.py {options}` makes this page, in {minutes:.0f} minutes of one core. The "
        f"{snapshots} snapshots, {apart} steps apart, are of a run that goes on from the first shipped digit network "
        "at a constant learning rate; the five shipped networks are of different seeds. Merges are sums of weights: "
        f"uniform, greedy, or fitted by gradients through the fold.{distilled if student else ''} All choices are made "
        f"on training images, and judged on {min(rows, len(test))} test images, which no network has seen."
    )
    facts = {"processor_minutes": minutes, "provenance": provenance(member_paths("digits"))}
    write(studies, out, "Merge, ensemble or distil", intro, **facts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/evaluation/merging"))
    for name, parameter in inspect.signature(main).parameters.items():
        if name != "out":
            parser.add_argument(f"--{name}", type=int, default=parameter.default)
    main(**vars(parser.parse_args()))
