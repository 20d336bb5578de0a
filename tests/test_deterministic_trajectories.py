"""Deterministic mode: whole runs of a sampler."""

import pytest
import torch

import fastens
from fastens.evaluation.denoiser import Denoiser
from fastens.samplers import Sampler
from tests.replayed import replayed_by_code
from tests.test_deterministic import Rows, members_of, unet


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_trajectories_first_planned_and_captured(eta, monkeypatch):
    """A sample is that of its number alone, in whatever company; recordings run again in place of CUDA graphs."""
    replays = replayed_by_code(monkeypatch)
    denoiser = Denoiser(fastens.Ensemble(members_of(unet, torch.float32, 2)), fastens.schedules.VP(), "epsilon")
    sampler, seen = Sampler(denoiser, steps=4, eta=eta), Rows()
    with fastens.deterministic():
        for numbers in ([0, 1, 2, 3, 4], [3], [4, 1], [0, 1, 2, 3, 4]):
            seen.meet(numbers, sampler(torch.tensor(numbers), (3, 8, 8), seed=7))
        sampler._record(2, (3, 8, 8))
        seen.meet([2, 4], sampler(torch.tensor([2, 4]), (3, 8, 8), seed=7))
        count = len(replays)
        assert count
    sampler(torch.tensor([2, 4]), (3, 8, 8), seed=7)  # in the fast mode, which the recordings are not of
    assert len(replays) == count
