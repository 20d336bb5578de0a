"""Merging along one run and across seeds: ``python examples/merging.py`` writes docs/evaluation/merging.

A shipped digit network is trained on at a constant learning rate, and its snapshots are merged; then the five shipped
members, of different seeds, are merged, and their ensemble is distilled into a student.
"""

import argparse
import functools
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


def main(out: Path, snapshots: int = 8, apart: int = 100, student_steps: int = 4000, rows: int = 397) -> None:
    """Write the report."""
    begun = time.process_time()
    train, test = load_digits()
    study = functools.partial(merge_study, fit=train, test=test[:rows], schedule=Discrete.linear(), progress=True)
    studies = {
        "snapshots of one run": study(continued(snapshots, apart)),
        "members of five seeds": study(fastens.load_members(member_paths("digits")), student_steps=student_steps),
    }
    minutes = (time.process_time() - begun) / 60
    intro = (
        f"`python examples/merging.py` makes this page, in {minutes:.0f} minutes of a processor core. {snapshots} "
        f"snapshots, {apart} steps apart, are of a run that goes on from the first shipped digit network at a constant "
        "learning rate; the five shipped networks are of different seeds. Merges are sums of weights: uniform, greedy, "
        "or fitted by gradients through the fold. The student begins as the best member and is distilled from the "
        f"ensemble on the training images, in {student_steps} steps. All choices are made on training images, and "
        "judged on test images, which no network has seen."
    )
    facts = {
        "processor_minutes": minutes,
        "threads": torch.get_num_threads(),
        "provenance": provenance(member_paths("digits")),
    }
    write(studies, out, "Merge, ensemble or distil", intro, **facts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/evaluation/merging"))
    main(parser.parse_args().out)
