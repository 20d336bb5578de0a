"""Methods of members that list their parameters: norms, moving averages, optimizers, files."""

import copy
import io

import pytest
import torch
from torch import nn

import fastens


class Listing(nn.Module):
    """Methods that list parameters."""

    own: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.register_buffer("same", torch.zeros(2))
        self.register_buffer("own", torch.rand(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [B, 4] to [B, 4]."""
        return self.inner(x) + self.own.sum()

    def norm(self) -> torch.Tensor:
        """What is computed of each."""
        return sum(p.norm() for p in self.parameters())  # pyright: ignore[reportReturnType]

    def norm_of_all(self) -> torch.Tensor:
        """What is computed of all."""
        return torch.cat([x.flatten() for _, x in self.named_parameters()]).norm() + sum(
            x.sum() for x in self.buffers()
        )

    def normalize(self) -> None:
        """Write to each what depends on it."""
        with torch.no_grad():
            for p in self.parameters():
                p.div_(p.norm())

    def average(self, other: nn.Module) -> None:
        """Take half of another's."""
        for mine, theirs in zip(self.parameters(), other.parameters(), strict=True):
            mine.data.lerp_(theirs.data, 0.5)

    def reset(self) -> None:
        """Write to each the same."""
        for p in self.parameters():
            nn.init.ones_(p)

    def facts(self) -> tuple:
        """What is no tensor."""
        first = next(self.parameters())
        return sum(p.numel() for p in self.parameters()), tuple(first.shape), first.dtype, first.device

    def optimizer(self) -> torch.optim.Optimizer:
        """What trains them."""
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def groups(self) -> list[dict]:
        """What an optimizer is made of."""
        return [{"params": list(self.parameters())}]

    def save(self, file: io.BytesIO) -> None:
        """Write them to a file."""
        torch.save(self.state_dict(), file)

    def load(self, file: io.BytesIO) -> None:
        """Read them from a file."""
        self.load_state_dict(torch.load(file))


@pytest.fixture(params=["auto", "loop"])
def pair(request):
    """An ensemble, and the members by themselves."""
    torch.manual_seed(0)
    members = [Listing() for _ in range(3)]
    ensemble, loop = fastens.Ensemble(members, engine=request.param), copy.deepcopy(members)
    with torch.no_grad():
        for _ in range(2):
            ensemble(torch.randn(2, 4))
    return ensemble, loop


def assert_same(ensemble, loop):
    """Hold an ensemble against the loop."""
    x = torch.randn(2, 4)
    with torch.no_grad():
        for _ in range(2):
            expected = torch.stack([member(x) for member in loop]).mean(0)
            torch.testing.assert_close(ensemble(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["norm", "norm_of_all"])
def test_what_is_computed_of_them_is_combined(pair, name):
    ensemble, loop = pair
    expected = torch.stack([getattr(member, name)() for member in loop]).mean(0)
    torch.testing.assert_close(getattr(ensemble, name)(), expected)


@pytest.mark.parametrize("name", ["normalize", "average", "reset"])
def test_what_is_written_to_them_is_each_members(pair, name):
    ensemble, loop = pair
    args = (Listing(),) if name == "average" else ()
    for each in (ensemble, *loop):
        getattr(each, name)(*args)
    assert_same(ensemble, loop)


def test_what_is_no_tensor_is_what_a_member_says(pair):
    ensemble, loop = pair
    assert ensemble.facts() == loop[0].facts()


def test_optimizers_train_the_stacks(pair):
    ensemble, loop = pair
    x = torch.randn(2, 4)
    for optimizer in (ensemble.optimizer(), torch.optim.SGD(ensemble.groups()[0]["params"], lr=0.1)):
        optimizer.zero_grad()
        ensemble.member_outputs(x).square().sum().backward()
        optimizer.step()
    for member in loop:
        for _ in range(2):
            optimizer = member.optimizer()
            optimizer.zero_grad()
            member(x).square().sum().backward()
            optimizer.step()
    assert_same(ensemble, loop)


def test_files_have_the_stacks(pair):
    ensemble, loop = pair
    file = io.BytesIO()
    ensemble.save(file)
    ensemble.reset()
    file.seek(0)
    ensemble.load(file)
    assert_same(ensemble, loop)


def test_a_device_that_a_method_returns_is_one(pair):
    ensemble, _ = pair
    assert isinstance(ensemble.facts()[-1], torch.device)
