"""What a network keeps for each thread by itself, as caches of text embeddings do: each thread has its own."""

import copy
import pickle
import threading
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import fastens
from tests.tolerances import NETWORK, relative_error

K = 3


class Caching(nn.Module):
    """Keeps what it made of its text until it is cleared."""

    def __init__(self, lazily):
        super().__init__()
        self.of_text, self.layer = nn.Linear(4, 4), nn.Linear(4, 4)
        if not lazily:
            self.__dict__["kept"] = threading.local()

    def clear(self):
        self.kept.text = None

    def forward(self, x, text):
        if "kept" not in self.__dict__:
            self.__dict__["kept"] = threading.local()
        if getattr(self.kept, "text", None) is None:
            self.kept.text = self.of_text(text)
        return torch.tanh(self.layer(x) + self.kept.text)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("lazily", [False, True])
@pytest.mark.filterwarnings("ignore:fastens. members are evaluated one by one")
def test_each_thread_has_its_own(lazily, grad):
    torch.manual_seed(0)
    members = [Caching(lazily).eval() for _ in range(K)]
    references = [Caching(lazily).eval() for _ in range(K)]
    for reference, member in zip(references, members, strict=True):
        reference.load_state_dict(member.state_dict())
    ensemble = fastens.Ensemble(members)
    failures = []

    def calls():
        try:
            with torch.set_grad_enabled(grad):
                for rows in (2, 2, 2, 3, 2):
                    x, text = torch.randn(rows, 4), torch.randn(4)
                    expected = torch.stack([reference(x, text) for reference in references]).mean(0)
                    assert relative_error(ensemble(x, text), expected) < NETWORK[torch.float32]
        except Exception as error:
            failures.append(error)

    for _ in range(2):
        calls()
        thread = threading.Thread(target=calls)
        thread.start()
        thread.join()
        ensemble.clear()
        for reference in references:
            reference.clear()
    assert not failures
    x, text = torch.randn(2, 4), torch.randn(4)
    for member, reference in zip(ensemble.members, references, strict=True):
        assert relative_error(member(x, text), reference(x, text)) < NETWORK[torch.float32]


def test_a_member_that_copy_refuses_for_it_can_be_one():
    members = [Caching(False).eval() for _ in range(K)]
    with pytest.raises(TypeError, match="_local"):
        copy.deepcopy(members[0])
    x = torch.randn(2, 4)
    for _ in range(2):
        expected = torch.stack([member(x, x[0]) for member in members]).mean(0)
        with pytest.warns(UserWarning, match="one by one"):
            ensemble = fastens.Ensemble(members)
        assert relative_error(ensemble(x, x[0]), expected) < NETWORK[torch.float32]


class Copyable(Caching):
    """Says itself how it is copied, as classes that keep locks and values for each thread do."""

    def __init__(self):
        super().__init__(True)
        self.calls = 0

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "kept"}

    def forward(self, x, text):
        self.calls += 1
        return super().forward(x, text)


@pytest.mark.filterwarnings("ignore:fastens. members are evaluated one by one")
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
@pytest.mark.parametrize("assigned", [False, True])
def test_copies_of_members_that_are_looped_keep_the_rest(duplicate, assigned):
    torch.manual_seed(0)
    members = [Copyable().eval() for _ in range(K)]
    ensemble, x, text = fastens.Ensemble(members, engine="loop"), torch.randn(3, 4), torch.randn(4)
    for member in members:
        member(x, text)
    with ensemble.assigned([0, 1, 2]) if assigned else nullcontext():
        ensemble(x, text)
    made, others = duplicate(ensemble), [duplicate(member) for member in members]
    text = torch.randn(4)  # which copies have not kept
    expected = torch.stack([other(x, text) for other in others])
    assert relative_error(made.member_outputs(x, text), expected) < NETWORK[torch.float32]
    assert [member.calls for member in made.members] == [2] * K
