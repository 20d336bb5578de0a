"""Members whose class's own ``train()``, ``eval()`` and ``to()`` return nothing."""

import pytest
import torch
from torch import nn

import fastens
from fastens.composition import Guided, compose
from fastens.merging import merge_weights
from fastens.schedules import VP
from fastens.training import distill
from tests.tolerances import relative_error

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Silent(nn.Linear):
    """As many networks that keep an encoder frozen."""

    def __init__(self, seed=0):
        super().__init__(4, 4)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(generator=generator)

    def forward(self, x, t=None, condition=0.0):
        return super().forward(x) + condition

    def train(self, mode=True):
        super().train(mode)

    def eval(self):
        super().eval()

    def requires_grad_(self, requires_grad=True):
        super().requires_grad_(requires_grad)

    def to(self, *args, **kwargs):
        super().to(*args, **kwargs)

    def double(self):
        super().double()


def members():
    return [Silent(seed) for seed in range(3)]


def saved(tmp_path):
    fastens.Ensemble(members()).save_pretrained(tmp_path)
    return fastens.Ensemble.from_pretrained(tmp_path, Silent)


def loaded(tmp_path, **options):
    for k, member in enumerate(members()):
        torch.save(member.state_dict(), tmp_path / f"{k}.pt")
    return fastens.Ensemble(fastens.load_members(str(tmp_path / "*.pt"), Silent, **options))


def pickled(tmp_path):
    for k, member in enumerate(members()):
        torch.save({"net": member}, tmp_path / f"{k}.pt")
    return fastens.Ensemble(fastens.load_members(str(tmp_path / "*.pt"), allow_pickle=True))


def moved(tmp_path):
    return fastens.Ensemble(members()).to("cpu").double().float().requires_grad_(False).train().eval()


def placed(tmp_path):
    return fastens.Ensemble(members(), device="cpu", dtype=torch.float32)


def replaced(tmp_path, engine="fold"):
    ensemble = fastens.Ensemble([*members()[:2], Silent(7) if engine == "fold" else nn.Linear(4, 4)], engine=engine)
    ensemble.replace_member(2, Silent(2))
    return ensemble


def guided(tmp_path):
    ensemble = fastens.Ensemble(members())
    composed = compose(ensemble, Guided(1.0, unconditional={"condition": torch.zeros(3, 1)}))
    return lambda x: composed(x, torch.tensor(3), condition=torch.ones(3, 1)) - 1


def merged(tmp_path):
    return fastens.merge(members())


def merged_greedily(tmp_path):
    wanted = fastens.merge(members())(X).detach()
    weights = merge_weights(members(), "greedy", lambda ens: (ens.member_outputs(X) - wanted).square())
    assert weights
    return merged(tmp_path)


MADE = {
    "saved": saved,
    "loaded": loaded,
    "loaded to a place": lambda path: loaded(path, device="cpu", dtype=torch.float32),
    "pickled": pickled,
    "moved": moved,
    "placed": placed,
    "replaced": replaced,
    "replaced, looped": lambda path: replaced(path, "loop"),
    "guided": guided,
    "merged": merged,
    "merged greedily": merged_greedily,
}


@pytest.mark.parametrize("made", MADE.values(), ids=MADE)
def test_what_is_made_of_them_is_the_loop(made, tmp_path):
    expected = sum(member(X) for member in members()) / 3
    assert relative_error(made(tmp_path)(X), expected) < 1e-5


def test_members_around_one_and_a_student():
    data = [(X, X)]
    around = fastens.laplace(Silent(), lambda model, batch: (model(batch[0]) - batch[1]).square().mean(1), data, 2)
    assert torch.isfinite(around(X)).all()
    found = distill(fastens.Ensemble(members()), Silent(9), X / 3, schedule=VP(), steps=2)
    assert not found.student.training
    assert all(parameter.requires_grad for parameter in found.student.parameters())
