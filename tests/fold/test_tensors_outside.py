"""Tensors outside of the members that their code writes to: each call writes to them as often as the loop does."""

import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastens

TENSOR = torch.zeros(3)
LIST, TABLE, OBJECT = [torch.zeros(3)], {"sum": torch.zeros(3)}, types.SimpleNamespace(sum=torch.zeros(3))


class Layer(nn.Module):
    total = torch.zeros(3)

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)


def by_method(self, x):
    TENSOR.add_(1)
    return self.layer(x) + TENSOR


def by_operator(self, x):
    total = TENSOR
    total += 1
    return self.layer(x) + total


def by_index(self, x):
    TENSOR[0] += 1
    return self.layer(x) + TENSOR


def by_out(self, x):
    torch.add(TENSOR, 1, out=TENSOR)
    return self.layer(x) + TENSOR


def by_layer(self, x):
    TENSOR.sub_(1)
    return self.layer(x) - F.hardtanh(TENSOR, -2, 2, inplace=True)


def in_a_list(self, x):
    LIST[0].add_(1)
    return self.layer(x) + LIST[0]


def in_a_dictionary(self, x):
    TABLE["sum"].add_(1)
    return self.layer(x) + TABLE["sum"]


def in_an_object(self, x):
    OBJECT.sum.add_(1)
    return self.layer(x) + OBJECT.sum


def of_the_class(self, x):
    self.total.add_(1)
    return self.layer(x) + self.total


def by_default(self, x, total=torch.zeros(3)):  # noqa: B008 - one for all calls is what is tested
    total.add_(1)
    return self.layer(x) + total


def _add():
    return TENSOR.add_(1)


def by_function(self, x):
    return self.layer(x) + _add()


def _closing_over(total):
    def forward(self, x):
        total.add_(1)
        return self.layer(x) + total

    return forward


CLOSED = torch.zeros(3)
in_a_closure = _closing_over(CLOSED)
EVERY = [
    by_method, by_operator, by_index, by_out, by_layer, in_a_list, in_a_dictionary, in_an_object, of_the_class,
    by_default, by_function, in_a_closure,
]  # fmt: skip
HELD = [TENSOR, LIST[0], TABLE["sum"], OBJECT.sum, Layer.total, by_default.__defaults__[0], CLOSED]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("forward", EVERY, ids=lambda forward: forward.__name__)
def test_it_is_written_to_as_in_the_loop(forward, grad):
    kind = type("Writes", (Layer,), {"forward": forward})
    members, x = [kind() for _ in range(2)], torch.randn(2, 3)

    def run(call):
        for each in HELD:
            each.zero_()
        outputs = [call(x) for _ in range(3)]
        return [*outputs, *(each.clone() for each in HELD)]

    with torch.set_grad_enabled(grad), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        expected = run(lambda x: torch.stack([member(x) for member in members]).mean(0))
        ensemble = fastens.Ensemble(members)
        found = run(ensemble)
    torch.testing.assert_close(found, expected)
    assert any("their code changes what they share" in str(w.message) for w in caught)


def test_one_that_is_only_read_costs_nothing():
    kind = type("Reads", (Layer,), {"forward": lambda self, x: self.layer(x) + TENSOR.abs() + self.total})
    ensemble, x = fastens.Ensemble([kind() for _ in range(2)]), torch.randn(2, 3)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            ensemble(x)
    assert ensemble.report().plans
