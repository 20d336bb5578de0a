"""Students of an ensemble: what they are trained on, and gradients through the frozen ensemble to what it is shown."""

import importlib.util
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import fastens
from fastens.evaluation import Denoiser
from fastens.schedules import VP, Discrete
from fastens.training import distill, score_matching
from tests.fresh import python
from tests.networks import randomised, small_unet


class Net(nn.Module):
    """A denoiser of points, with a class."""

    def __init__(self, seed, width=16, classes=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(classes, width) if classes else None
        self.first, self.last = nn.Linear(3, width), nn.Linear(width, 2)

    def forward(self, x, t, label=None):
        h = self.first(torch.cat([x, t[:, None].to(x)], 1))
        return self.last(torch.tanh(h if self.embed is None else h + self.embed(label)))


def points(rows, seed=0):
    return torch.rand(rows, 2, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def difference(ensemble, student, **condition):
    """How far a student is from an ensemble on noisy points, relative to the size of what that predicts."""
    generator, schedule = torch.Generator().manual_seed(3), VP()
    t = 1e-3 + (1 - 1e-3) * torch.rand(400, generator=generator).double()
    alpha, sigma = schedule.coefficients(t, points(400))
    x = alpha * points(400) + sigma * torch.randn(400, 2, generator=generator)
    with torch.no_grad():
        ours, theirs = (Denoiser(net, schedule, "epsilon", condition).epsilon(x, t) for net in (student, ensemble))
    return float((ours - theirs).square().mean() / theirs.square().mean())


@pytest.mark.parametrize("rule", ["mean", "median"])
def test_a_student_comes_to_predict_what_the_ensemble_does_under_its_rule(rule):
    ensemble, new = fastens.Ensemble([Net(k) for k in range(3)], rule), Net(9, width=32)
    kept = {name: value.clone() for name, value in (*ensemble.state_dict().items(), *new.state_dict().items())}
    found = distill(ensemble, new, points(64), schedule=VP(), steps=1500, learning_rate=1e-2)
    other = ensemble.with_rule({"mean": "median", "median": "mean"}[rule])
    assert difference(ensemble, found.student) < 0.03 < 0.3 < difference(other, found.student)
    assert difference(ensemble, new) > 1
    assert found.losses[-1] < found.losses[0] / 10
    assert not found.student.training
    after = dict((*ensemble.state_dict().items(), *new.state_dict().items()))
    assert all(torch.equal(value, after[name]) for name, value in kept.items())  # neither is changed
    assert all(p.grad is None for p in (*ensemble.parameters(), *new.parameters()))


@pytest.mark.parametrize("frozen", ["nothing", "first", "all"])
def test_what_is_frozen_in_a_student_stays_as_it_is_unless_all_is(frozen):
    ensemble, student = fastens.Ensemble([Net(k) for k in range(2)]), Net(9)
    if frozen != "nothing":
        (student.first if frozen == "first" else student).requires_grad_(False)
    found = distill(ensemble, student, points(16), schedule=VP(), steps=2).student
    for name, p in found.named_parameters():
        stays = frozen == "first" and name.startswith("first.")
        assert torch.equal(p, dict(student.named_parameters())[name]) == stays, name
        assert p.requires_grad != stays


def test_conditions_go_with_their_rows_and_draws_with_the_seed():
    ensemble = fastens.Ensemble([Net(k, classes=2) for k in range(2)])
    with torch.no_grad():
        ensemble.network.embed.weight.mul_(2)
    data, labels = points(64), torch.arange(64) % 2
    settings = {"schedule": VP(), "conditions": {"label": labels}, "steps": 1500, "learning_rate": 1e-2}
    found = distill(ensemble, Net(9, width=32, classes=2), data, **settings).student
    for label in (0, 1):
        assert difference(ensemble, found, label=torch.full((400,), label)) < 0.02
    again, other = (
        distill(ensemble, Net(9, classes=2), data, **{**settings, "steps": 3}, seed=seed).student for seed in (0, 1)
    )
    same = distill(ensemble, Net(9, classes=2), data, **{**settings, "steps": 3}, seed=0).student
    assert torch.equal(again.first.weight, same.first.weight)
    assert not torch.equal(again.first.weight, other.first.weight)


def test_a_student_of_another_prediction_and_data_of_a_function():
    schedule = Discrete.linear()
    ensemble = fastens.Ensemble([randomised(small_unet, k) for k in range(2)])
    asked = []

    def draw(number, generator):
        asked.append(number)
        return torch.rand(number, 1, 8, 8, generator=generator) * 2 - 1

    settings = {"schedule": schedule, "steps": 2, "batch_size": 4}
    found = distill(ensemble, small_unet(), draw, student_prediction="x0", **settings)
    assert asked == [4, 4]
    x, t = torch.randn(2, 1, 8, 8), torch.tensor(300.0, dtype=torch.float64)
    assert Denoiser(found.student, schedule, "x0").epsilon(x, t).isfinite().all()


def test_gradients_through_the_ensemble_are_the_loops_and_reach_no_member():
    """The path of one-step students: a generator's parameters behind noisy samples behind both scores."""
    members = [Net(k).double() for k in range(3)]
    ensemble, fake = fastens.Ensemble(members), Net(7).double()
    maker, noise, t = nn.Linear(2, 2).double(), points(8).double(), torch.rand(8, dtype=torch.float64)

    def gradient(teacher, through):
        maker.zero_grad()
        theirs, ours = score_matching(
            teacher, Denoiser(fake, VP()), 0.8 * maker(noise) + 0.6 * noise, t, through=through
        )
        (theirs - ours).square().sum().backward()
        return maker.weight.grad.clone()

    class Loop(nn.Module):
        def forward(self, x, t):
            return torch.stack([member(x, t) for member in members]).mean(0)

    found = gradient(Denoiser(ensemble, VP()), True)
    assert all(p.grad is None for p in ensemble.parameters())
    assert ensemble.network.first.weight.requires_grad
    x = 0.8 * maker(noise) + 0.6 * noise  # the definition, with nothing frozen
    (Denoiser(Loop(), VP()).epsilon(x, t) - Denoiser(fake, VP()).epsilon(x, t)).square().sum().backward()
    expected = maker.weight.grad - found
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    apart = gradient(Denoiser(ensemble, VP()), False)
    assert not torch.allclose(apart, found)  # along x alone


def test_the_ensemble_is_planned_where_no_gradient_goes_through_it():
    ensemble = fastens.Ensemble([randomised(small_unet, k) for k in range(2)])
    distill(ensemble, ensemble.members[0], torch.zeros(4, 1, 8, 8), schedule=Discrete.linear(), steps=4, batch_size=4)
    report = ensemble.report()
    assert report.plans or not report.target  # no library, no plans


@pytest.mark.parametrize("module", ["training", "evaluation", "merging"])
def test_a_module_can_be_imported_first(module):
    result = python(f"import fastens.{module}")
    assert result.returncode == 0, result.stderr


def test_a_student_with_counters():
    ensemble = fastens.Ensemble([Net(k) for k in range(2)])

    class Normed(Net):
        def __init__(self):
            super().__init__(9)
            self.norm = nn.BatchNorm1d(2)

        def forward(self, x, t):
            return self.norm(super().forward(x, t))

    found = distill(ensemble, Normed(), points(64), schedule=VP(), steps=7).student
    assert found.norm.num_batches_tracked == 7
    assert found.norm.running_var.isfinite().all()


def test_bad_input():
    ensemble = fastens.Ensemble([Net(k) for k in range(2)])
    with pytest.raises(TypeError, match="expected one network"):
        distill(ensemble, ensemble, points(4), schedule=VP())
    with pytest.raises(ValueError, match="schedule"):
        distill(ensemble, Net(9), points(4))
    with pytest.raises(ValueError, match="at least one step"):
        distill(ensemble, Net(9), points(4), schedule=VP(), steps=0)
    with pytest.raises(ValueError, match="a value for each of 4 rows"):
        distill(ensemble, Net(9), points(4), schedule=VP(), conditions={"label": torch.zeros(3)})
    with pytest.raises(ValueError, match="data is a function"):
        distill(ensemble, Net(9), lambda n, g: points(n), schedule=VP(), conditions={"label": torch.zeros(3)})
    with pytest.raises(ValueError, match="scale the data"):
        distill(ensemble, Net(9), 9 * points(4), schedule=VP())


def test_the_example_of_one_step(tmp_path):
    path = Path(__file__).resolve().parent.parent / "examples" / "one_step.py"
    spec = importlib.util.spec_from_file_location("one_step", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    before, after = module.train(2, batch=4)
    moved = zip(before.model.parameters(), after.model.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in moved)
    module.main(tmp_path / "one_step.png", steps=1)
    assert len(Image.open(tmp_path / "one_step.png").convert("L").getcolors()) > 10
