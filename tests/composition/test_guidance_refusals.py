"""Guidance that cannot be: each error says what is missing and what to do."""

import pytest
import torch

import fastens
from fastens import schedules
from fastens.composition import Autoguided, Guided, compose
from tests.composition.networks import LABELS, NULL, NULLS, SCHEDULE, B, Network, T, Unconditional, made


@pytest.fixture
def x():
    return torch.randn(B, 2, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class BatchNormed(Network):
    def forward(self, x, t, class_labels=None):
        y = super().forward(x, t, class_labels)
        return y - y.mean(0)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda e: Guided(2.0), ValueError, "unconditional is empty"),
        (lambda e: Guided("a", unconditional={"y": 1}), ValueError, "scale is 'a'"),
        (lambda e: Guided(float("inf"), unconditional={"y": 1}), ValueError, "scale is inf"),
        (lambda e: Guided(2.0, unconditional=3), TypeError, "arguments by name"),
        (lambda e: Guided(2.0, interval=(2, 1), unconditional={"y": 1}), ValueError, "0 <= low < high"),
        (lambda e: Guided([1, 2], log_snr=[2, 1], unconditional={"y": 1}), ValueError, "rising"),
        (lambda e: Autoguided(2.0), TypeError, "expected a torch.nn.Module"),
        (lambda e: Autoguided(2.0, weak=e.with_rule("alternating")), ValueError, "weak.with_rule"),
        (lambda e: compose(e), TypeError, "expected Guided or Autoguided"),
        (lambda e: compose(3, Guided(2.0, unconditional={"y": 1})), TypeError, "model is a int"),
        (lambda e: compose(e, Guided(2.0, unconditional={"y": 1})), ValueError, "take no such argument"),
        (
            lambda e: compose(e, Guided(2.0, unconditional={"class_labels": 4}), order="during"),
            ValueError,
            "order 'during'",
        ),
        (
            lambda e: compose(e, Guided(2.0, interval=(0, 1), unconditional={"class_labels": 4})),
            ValueError,
            "pass schedule= to the ensemble",
        ),
        (
            lambda e: compose(e, Autoguided(2.0, weak=fastens.Ensemble(made(), prediction="v"))),
            ValueError,
            "predicts None and the weak one 'v'",
        ),
        (
            lambda e: compose(
                fastens.Ensemble(made(), schedule=SCHEDULE),
                Autoguided(2.0, weak=fastens.Ensemble(made(), schedule=schedules.VE())),
            ),
            ValueError,
            "trained under",
        ),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make(fastens.Ensemble(made()))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (lambda: made(Unconditional), "they are unconditional, or leave the argument unused"),
        (lambda: made(BatchNormed), "it mixes the rows of a batch"),
    ],
)
def test_members_that_cannot_be_guided_so(x, members, message):
    guided = compose(fastens.Ensemble(members()), Guided(2.0, unconditional={"class_labels": NULL}))
    with pytest.raises(ValueError, match=message):
        guided(x, T, LABELS)


def test_a_condition_that_is_none_is_no_error(x):
    guided = compose(fastens.Ensemble(made()), Guided(2.0, unconditional={"class_labels": NULL}))
    torch.testing.assert_close(guided(x, T, NULLS), guided.ensemble(x, T, NULLS))


def test_a_call_without_its_condition(x):
    guided = compose(fastens.Ensemble(made()), Guided(2.0, unconditional={"class_labels": NULL}))
    with pytest.raises(ValueError, match="no such argument, and so no condition"):
        guided(x, T)


def test_a_composition_is_not_saved_as_its_ensemble(tmp_path):
    guided = compose(fastens.Ensemble(made()), Guided(2.0, unconditional={"class_labels": NULL}))
    with pytest.raises(ValueError, match="compose them again"):
        guided.save_pretrained(tmp_path)
