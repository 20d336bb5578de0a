"""The demo's parts: the shipped members, the training that made them, and the main job."""

import json

import pytest
import torch

from fastens.demo import member_paths
from fastens.demo.run import run_demo
from fastens.demo.train import main as train
from fastens.demo.train import train_member, train_together
from fastens.ensemble import Ensemble
from tests.tolerances import relative_error


def test_shipped_members_beat_their_mean_loss():
    from fastens.demo.data import load_digits
    from fastens.demo.train import noise_predictions

    paths = member_paths()
    assert len(paths) == 5
    log = json.loads((paths[0].parent / "training.json").read_text())
    _, test = load_digits()
    ensemble = Ensemble(paths)
    noise, predicted = noise_predictions(ensemble, test[:100], draws=2)
    alone = [noise_predictions(member, test[:100], draws=2)[1] for member in ensemble.members]
    losses = [float((p - noise).square().mean()) for p in alone]
    together = float((predicted - noise).square().mean())
    diversity = float((torch.stack(alone) - predicted).square().mean())
    assert together < min(losses)
    assert abs(sum(losses) / 5 - together - diversity) < 1e-6  # the identity: member mean = ensemble + diversity
    assert abs(together - log["mean_ensemble_test_loss"]) < 0.01


@pytest.mark.parametrize("how", [[], ["--separate"]])
def test_training_is_deterministic(tmp_path, how):
    for name in ("a", "b"):
        train(["--out", str(tmp_path / name), "--members", "1", "--steps", "2", *how])
    files = [tmp_path / name / "member_0" / "diffusion_pytorch_model.safetensors" for name in ("a", "b")]
    assert files[0].read_bytes() == files[1].read_bytes()


class Silent:
    """Stands for a progress bar."""

    def set_postfix(self, **_):
        pass

    def update(self, _):
        pass


def test_members_trained_together_are_those_trained_alone():
    # In float64: Adam's first steps have length 1 whatever the gradient's, and make of a rounding error of float32 in a
    # gradient near zero a difference of the size of the step.
    torch.set_default_dtype(torch.float64)
    try:
        images = torch.rand(100, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
        together = train_together(images, 3, [4, 7], Silent())
        for seed, (model, losses) in zip([4, 7], together, strict=True):
            alone, alone_losses = train_member(images, 3, seed, Silent())
            assert losses == pytest.approx(alone_losses, abs=1e-6)
            for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
                assert relative_error(ours.detach(), theirs.detach()) < 1e-9
    finally:
        torch.set_default_dtype(torch.float32)


def test_main_job(tmp_path):
    run_demo(tmp_path, num=2, steps=2, batch=2, rounds=1)
    figures = json.loads((tmp_path / "demo.json").read_text())
    assert figures["engine"] == "fold"
    assert figures["fold_against_loop"] < 1e-5
    assert (tmp_path / "demo.png").stat().st_size > 10_000
