"""What members register in their calls is in the state dicts of the ensemble, looped or not, as in the members' own."""

import copy

import pytest
import torch
from torch import nn

import fastens
from tests.networks import randomised

K = 3


class Registering(nn.Module):
    """Keeps a moving average in a buffer that its first call makes, as the kind says; and one that is not saved."""

    def __init__(self, kind):
        super().__init__()
        self.layer, self.part, self.kind = nn.Linear(4, 4), nn.Module(), kind
        if kind == "none":
            self.part.register_buffer("mean", None)

    def forward(self, x):
        h = self.layer(x)
        own = h.detach().mean(0)
        if self.kind == "of other shapes":
            own = own[: 2 + int(self.layer.weight[0, 0] > 0)].mean() * own.new_ones(
                2 + int(self.layer.weight[0, 0] > 0)
            )
        if getattr(self.part, "mean", None) is None:
            self.part.register_buffer("mean", own)
            self.register_buffer("temporary", own * 0, persistent=False)
        self.part.mean = self.part.mean * 0.9 + own * 0.1
        return h - self.part.mean.mean() + self.temporary.sum()


def held(kind, engine):
    members = [randomised(lambda: Registering(kind), seed) for seed in range(K)]
    if kind == "of other shapes":
        members[1].layer.weight.data[0, 0] = -1.0
        members[2].layer.weight.data[0, 0] = 1.0
    ensemble = fastens.Ensemble(copy.deepcopy(members), engine=engine)
    for seed in range(3):
        called(ensemble, members, seed)
    return ensemble, members


def called(ensemble, members, seed):
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
    expected = torch.stack([member(x) for member in members])
    torch.testing.assert_close(ensemble.member_outputs(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:fastens. members are evaluated one by one")
@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("kind", ["new", "none"])
@torch.no_grad()
def test_a_state_dict_has_it(kind, engine, tmp_path):
    ensemble, members = held(kind, engine)
    state = ensemble.state_dict()
    assert set(state) == {f"network.{name}" for name in members[0].state_dict()}
    for name, stack in state.items():
        expected = [member.state_dict()[name.removeprefix("network.")] for member in members]
        torch.testing.assert_close(stack, torch.stack(expected), rtol=1e-4, atol=1e-5)
    kept = {name: x.clone() for name, x in state.items()}
    theirs = [copy.deepcopy(member.state_dict()) for member in members]
    called(ensemble, members, 7)
    ensemble.load_state_dict(kept)
    for member, own in zip(members, theirs, strict=True):
        member.load_state_dict(own)
    for seed in range(2):
        called(ensemble, members, seed)
    with pytest.raises(RuntimeError, match=r"Missing key.*part\.mean"):
        ensemble.load_state_dict({name: x for name, x in kept.items() if "mean" not in name})
    fresh = fastens.Ensemble([randomised(lambda: Registering(kind), seed) for seed in range(K)], engine=engine)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*part\.mean"):  # as torch, of a member
        fresh.load_state_dict(kept)
    ensemble.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the member has no part\.mean.*what its calls register"):
        fastens.Ensemble.from_pretrained(tmp_path, factory=lambda: Registering(kind))


@torch.no_grad()
def test_what_has_no_stack_is_named():
    ensemble, members = held("of other shapes", "loop")
    with pytest.warns(UserWarning, match="part.mean is of another shape or dtype in other members"):
        state = ensemble.state_dict()
    assert "network.part.mean" not in state
    for k, member in enumerate(members):
        torch.testing.assert_close(ensemble.members[k].state_dict()["part.mean"], member.part.mean)
