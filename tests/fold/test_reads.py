"""Values that Python or a function's own code reads: no plan has those of the input; it rests on those of constants."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fastens
from fastens import _native
from tests.networks import randomised
from tests.tolerances import relative_error

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


class Reading(nn.Module):
    """Looks at the values of its time in a way that is given."""

    def __init__(self, how):
        super().__init__()
        self.how, self.layer = how, nn.Linear(4, 4)

    def forward(self, x, t):
        return self.layer(x) * self.how(t)


def packed(t):
    """Rows of ones, each as long as its value says, packed."""
    lengths = t.long().clamp(1, 6)
    return pack_padded_sequence(torch.ones(6, 6, 2), lengths, batch_first=True, enforce_sorted=False)


def losses(t):
    """CTC losses of inputs as long as the values say."""
    scores = torch.arange(300.0).view(10, 6, 5).sin().log_softmax(-1)
    return nn.functional.ctc_loss(scores, torch.ones(6, 1).long(), t.long().clamp(1, 10), torch.ones(6).long())


def rows_by_step(t):
    """Two or three rows of 5 numbers, as a packed sequence of two steps."""
    first = 3 + (t[0] > 4).long()
    return PackedSequence(torch.arange(5.0), torch.stack([first, 5 - first]))


RECURRENT = torch.nn.LSTM(2, 2).requires_grad_(False)
READS = {
    "tolist": lambda t: sum(t.tolist()),
    "item": lambda t: t[0].item(),
    "numpy": lambda t: float(t.numpy().sum()),
    "asarray": lambda t: float(np.asarray(t).sum()),
    "float": lambda t: float(t[0]),
    "int": lambda t: int(t[0]),
    "bool": lambda t: 2 if t.sum() > 10 else 3,
    "all": lambda t: 2 if bool((t > 2).all()) else 3,
    "equal": lambda t: 2 if torch.equal(t, torch.full_like(t, 3)) else 3,
    "allclose": lambda t: 2 if torch.allclose(t.float(), torch.tensor(3.0)) else 3,
    "in": lambda t: 2 if 3 in t else 3,
    "nonzero": lambda t: len(torch.nonzero(t > 2)) + 1,
    "unique": lambda t: len(torch.unique(t)) + 1,
    "mask": lambda t: t[t > 2].float().sum() + 1,
    "format": lambda t: len(f"{t[0]}"),
    "iteration": lambda t: sum(int(v) for v in t),
    "range": lambda t: sum(range(int(t[0]))) + 1,
    "dictionary": lambda t: {1: 0.5, 3: 2.0}.get(int(t[0]), 1.0),
    "bincount": lambda t: float(torch.bincount(t.long()).sum()),
    "max": lambda t: max(t[0], t[1]),
    "while": lambda t: sum(1 for i in range(20) if i < t[0]) + 1,
    "split": lambda t: torch.arange(18.0).tensor_split(t.long().sort().values)[0].sum() + 1,
    "packed": lambda t: packed(t).data.sum(),
    "padded": lambda t: pad_packed_sequence(packed(t), total_length=6)[0].sum(0).sum(-1, keepdim=True),
    "recurrent": lambda t: RECURRENT(packed(t), 2 * [torch.ones(1, 6, 2)])[1][0][0].sum(-1, keepdim=True),
    "ctc": losses,
    "of two steps": lambda t: pad_packed_sequence(rows_by_step(t))[0][1].sum() + 1,
    "tensor_split": lambda t: torch.arange(1.0, 7).tensor_split(t[:1].long(), 0)[0].sum() + 1,
}


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
@pytest.mark.parametrize("how", READS.values(), ids=READS)
def test_values_that_are_read_are_not_baked_in(how, dtype, monkeypatch):
    monkeypatch.setenv("FASTENS_AUDIT", "off")  # which would find the second call
    ensemble = fastens.Ensemble([randomised(lambda: Reading(how), seed) for seed in range(3)])
    with torch.no_grad():
        for t in ([3, 3, 3, 3, 3, 3], [1, 4, 2, 9, 3, 3], [3, 3, 3, 3, 3, 3], [5, 0, 6, 1, 8, 2], [12, 1, 0, 3, 3, 4]):
            times = torch.tensor(t, dtype=dtype)
            expected = torch.stack([member(X, times) for member in ensemble.members]).mean(0)
            assert relative_error(ensemble(X, times), expected) < 1e-5
    assert ensemble.engine == "fold"


class OfConstant(nn.Module):
    """Looks at the values of a tensor that it holds, not of its input."""

    def __init__(self, how, place):
        super().__init__()
        self.how, self.place, self.layer = how, place, nn.Linear(4, 4)
        held = torch.tensor([3.0, 1, 0, 2, 5, 4])
        self.register_buffer("held", held if place == "buffer" else None)
        self.listed = [held] if place == "list" else []

    def constant(self):
        return self.held if self.place == "buffer" else self.listed[0]

    def forward(self, x):
        given = self.constant() if self.place != "computed" else torch.arange(x.shape[0]).flip(0) * 0.5
        return self.layer(x) * self.how(given)


NOT_PLANNED = ("numpy", "asarray")  # arrays in the same memory, which is written to unnoticed


@pytest.mark.skipif(not _native.load(), reason=f"no compiled library: {_native.status()}")
@pytest.mark.parametrize("place", ["buffer", "list", "computed"])
@pytest.mark.parametrize("how", READS.values(), ids=READS)
def test_a_plan_rests_on_constants_that_are_read(how, place, monkeypatch):
    monkeypatch.setenv("FASTENS_AUDIT", "off")
    ensemble = fastens.Ensemble([randomised(lambda: OfConstant(how, place), seed) for seed in range(3)])
    with torch.no_grad():
        for factor in (1, 4):
            for part in (ensemble.network, *ensemble.members):
                if place != "computed":
                    part.constant().mul_(factor)
            for _ in range(3):
                expected = torch.stack([member(X) for member in ensemble.members]).mean(0)
                assert relative_error(ensemble(X), expected) < 1e-5
    assert ensemble.engine == "fold"
    assert bool(ensemble.report().plans) == (how not in [READS[name] for name in NOT_PLANNED])


class Causal(nn.Module):
    """As diffusion policies have it: torch's own layers look whether a mask is the causal one."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.full((6, 6), -torch.inf).triu(1))
        layer = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True, norm_first=True)
        self.inner, self.decoder, self.outer = nn.Linear(4, 8), nn.TransformerDecoder(layer, 1), nn.Linear(8, 4)

    def forward(self, x):
        h = self.inner(x)
        return self.outer(self.decoder(h, h[:, :2], tgt_mask=self.mask))


@pytest.mark.skipif(not _native.load(), reason=f"no compiled library: {_native.status()}")
def test_a_mask_that_torch_looks_at_is_planned():
    ensemble, x = fastens.Ensemble([randomised(Causal, seed) for seed in range(3)]), torch.randn(2, 6, 4)
    with torch.no_grad():
        for mask in (None, torch.zeros(6, 6), torch.full((6, 6), -torch.inf).triu(2)):
            if mask is not None:
                ensemble.network.mask.copy_(mask)
            for _ in range(3):
                expected = torch.stack([member(x) for member in ensemble.members]).mean(0)
                assert relative_error(ensemble(x), expected) < 1e-5
    assert ensemble.report().plans
