"""Members that return a number: a loss, or an auxiliary one beside their scores."""

import pytest
import torch
from torch import nn

import fastens
from tests.fold.contract import Held, averaged, batch, near


class Loss(nn.Module):
    def __init__(self, beside):
        super().__init__()
        self.inner, self.beside = nn.Linear(4, 4), beside

    def forward(self, x, t=None):
        h = self.inner(x)
        loss = h.square().mean()
        return {"sample": h, "loss": loss} if self.beside else loss


@pytest.mark.parametrize("engine", ["fold", "loop"])
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside scores"])
def test_a_number_of_each_member_is_combined(beside, engine):
    held = Held(lambda k: Loss(beside), engine=engine)
    held.sampling(batch(5, 4))
    if not beside:
        held.gradients(batch(5, 4))
    x = torch.randn(5, 4)
    outputs = held.loop(x)
    near(held.ensemble(x), averaged(outputs))
    combined, variance = held.ensemble.forward_with_variance(x)
    losses = torch.stack([o["loss"] if beside else o for o in outputs])
    near(variance["loss"] if beside else variance, losses.var(0, correction=0))
    assert (combined["loss"] if beside else combined).shape == ()
    stack = held.ensemble.member_outputs(x)
    near(stack["loss"] if beside else stack, losses)
    held.ensemble.rule = "median"
    found = held.ensemble(x)
    near(found["loss"] if beside else found, losses.median())


def test_weights_of_each_sample_do_not_go_with_one_number():
    rule = fastens.rules.NoiseDependentMean(((0.5, 0.5), (0.2, 0.8)), (-2.0, 2.0))
    held = Held(lambda k: Loss(False), 2, rule=rule, schedule=fastens.schedules.VP())
    with pytest.raises(ValueError, match=r"expected \[5, \.\.\.\]"):
        held.ensemble(torch.randn(5, 4), torch.rand(5))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x, scale):
        return self.inner(x * scale) + torch.sin(x + scale * 0.1) * scale**2


@pytest.mark.parametrize("engine", ["fold", "loop"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("planned", [False, True])
def test_numbers_of_each_member_keep_their_digits_and_no_dtype(engine, dtype, planned):
    members, scales = [Scaled().to(dtype) for _ in range(3)], [0.1, 0.7, 1 / 3]
    ensemble, x = fastens.Ensemble(members, engine=engine), torch.randn(5, 4, dtype=dtype)
    with torch.set_grad_enabled(not planned):
        found = [ensemble(x, fastens.PerMember(scales)) for _ in range(3)][-1]
        expected = torch.stack([member(x, scale) for member, scale in zip(members, scales, strict=True)]).mean(0)
    torch.testing.assert_close(found, expected, rtol=16 * torch.finfo(dtype).eps, atol=16 * torch.finfo(dtype).eps)
