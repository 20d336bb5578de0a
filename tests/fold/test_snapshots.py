"""Members hold state of every kind, and change it in place: each has its own, and no check of ours advances it."""

import array
import collections
import copy
import dataclasses
import functools
import itertools
import random
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastens
from fastens.network.snapshots import snapshots_of
from tests.fold.contract import K, near

pytestmark = pytest.mark.filterwarnings("ignore:fastens")


class Listed(list): ...


class Mapped(dict): ...


class Slotted:
    __slots__ = ("__private", "n")

    def __init__(self) -> None:
        self.n = self.__private = 0

    def step(self) -> int:
        self.n += 1
        self.__private += 1
        return self.n


@dataclasses.dataclass(slots=True)
class Counted:
    n: int = 0


class Outer:
    def __init__(self) -> None:
        self.inner = Slotted()


def closure() -> Callable[[], int]:
    n = 0

    def count() -> int:
        nonlocal n
        n += 1
        return n

    return count


def appending() -> Callable[[], int]:
    log: list[int] = []

    def count() -> int:
        log.append(1)
        return len(log)

    return count


def generator() -> Any:
    yield from range(100)


def appended(state: Any, _: Tensor) -> int:
    state.append(1)
    return len(state)


def entered(state: Any, _: Tensor) -> int:
    state[len(state)] = 1
    return len(state)


def added(state: Any, x: Tensor) -> Tensor:
    state.add_(x.detach().mean())
    return state[0].clone()


def counted(state: Any, _: Tensor) -> int:
    state.n += 1
    return state.n


def remembered(state: Any, x: Tensor) -> Tensor:
    state.append(x.detach().mean())
    return sum(state)  # pyright: ignore[reportReturnType]


def raised(state: Any, _: Tensor) -> float:
    state += 1
    return float(state[0])


STATES: dict[str, tuple[Callable[[], Any], Callable[[Any, Tensor], Any]]] = {
    "list": (list, appended),
    "kind of list": (Listed, appended),
    "kind of dict": (Mapped, entered),
    "ordered": (collections.OrderedDict, entered),
    "default": (lambda: collections.defaultdict(list), lambda s, _: appended(s["a"], _)),
    "counter": (collections.Counter, lambda s, _: (s.update("a"), s["a"])[1]),
    "deque": (lambda: collections.deque(maxlen=9), appended),
    "deque of tensors": (lambda: collections.deque(maxlen=2), remembered),
    "set": (set, lambda s, _: (s.add(len(s)), len(s))[1]),
    "bytes": (bytearray, appended),
    "array": (lambda: array.array("d"), appended),
    "numpy": (lambda: np.zeros(2), raised),
    "objects in numpy": (lambda: np.array([[], None], dtype=object), lambda s, _: appended(s[0], _)),
    "slots": (Slotted, lambda s, _: s.step()),
    "slots of a dataclass": (Counted, counted),
    "object in an object": (Outer, lambda s, _: s.inner.step()),
    "namespace": (lambda: types.SimpleNamespace(n=0), counted),
    "user dict": (collections.UserDict, entered),
    "user list": (collections.UserList, appended),
    "chain map": (lambda: collections.ChainMap({}), entered),
    "nested": (lambda: {"a": ([collections.deque()],)}, lambda s, _: appended(s["a"][0][0], _)),
    "tensor": (lambda: torch.zeros(1), added),
    "tensor in a list": (lambda: [torch.zeros(1)], lambda s, x: added(s[0], x)),
    "module in a list": (lambda: [nn.BatchNorm1d(4)], lambda s, x: s[0].train()(x)),
    "partial": (lambda: functools.partial(appended, []), lambda s, x: s(x)),
    "method": (lambda: Slotted().step, lambda s, _: s()),
    "count": (itertools.count, lambda s, _: next(s)),
    "iterator": (lambda: iter(range(100)), lambda s, _: next(s)),
    "python's generator": (lambda: random.Random(0), lambda s, _: s.random()),
    "numpy's generator": (lambda: np.random.default_rng(0), lambda s, _: float(s.random())),
    "numpy's old generator": (lambda: np.random.RandomState(0), lambda s, _: float(s.rand())),
    "torch's generator": (lambda: torch.Generator().manual_seed(0), lambda s, _: torch.rand((), generator=s)),
    "closure": (closure, lambda s, _: s()),
    "list in a closure": (appending, lambda s, _: s()),
    "generator function": (generator, lambda s, _: next(s)),
}


class Keeps(nn.Module):
    """Adds to its output what its state gives, read from its input or from what differs between members."""

    def __init__(self, kind: str, own: bool) -> None:
        super().__init__()
        make, self.step = STATES[kind]
        self.linear, self.state, self.own = nn.Linear(4, 4), make(), own

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        return h + 0.1 * self.step(self.state, h if self.own else x)


def members(kind: str, own: bool, number: int) -> list[nn.Module]:
    torch.manual_seed(0)
    return [Keeps(kind, own).eval() for _ in range(number)]


@pytest.mark.covering(2)
@pytest.mark.parametrize("own", [False, True], ids=["common", "own"])
@pytest.mark.parametrize("way", ["fold", "loop", "one member", "copied", "assigned"])
@pytest.mark.parametrize("kind", STATES)
def test_state_of_every_kind_is_each_members(kind, way, own):
    number = 1 if way == "one member" else K
    theirs = members(kind, own, number)
    ensemble = fastens.Ensemble(members(kind, own, number), engine="loop" if way == "loop" else "auto")
    with torch.no_grad():
        for i in range(6):
            x = torch.randn(3, 4)
            if way == "copied" and i == 3:
                if kind in ("closure", "list in a closure"):
                    pytest.skip("a copy of a function is the function")
                try:
                    theirs, ensemble = copy.deepcopy(theirs), copy.deepcopy(ensemble)
                except TypeError:
                    pytest.skip("it cannot be copied")
            if way == "assigned" and i % 3 == 1:
                rows = torch.tensor([0, number - 1, 0])
                alone = {k: theirs[k](x) for k in sorted({0, number - 1})}
                with ensemble.assigned(rows):
                    near(ensemble(x), torch.stack([alone[int(k)][i] for i, k in enumerate(rows)]))
                continue
            near(ensemble(x), torch.stack([member(x) for member in theirs]).mean(0))


@pytest.mark.parametrize("kind", [kind for kind in STATES if kind not in ("count", "iterator", "generator function")])
def test_what_is_put_back_is_as_it_was(kind):
    make, step = STATES[kind]
    state, x = make(), torch.randn(3, 4)
    first = step(state, x)
    held = snapshots_of(state, set())
    again = [step(state, x) for _ in range(2)]
    assert any([each.restored() for each in held])
    assert not any([each.restored() for each in held])
    for expected in again:
        assert torch.equal(torch.as_tensor(step(state, x)), torch.as_tensor(expected)), first


class DrawsInPython(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * random.random()


class DrawsInNumpy(DrawsInPython):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * float(np.random.rand())


class BranchesAtRandom(DrawsInPython):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if random.random() < 0.5 else self.linear(-x)


CALLS, LOG = 0, []


class CountsInClass(DrawsInPython):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        return self.linear(x) * self.calls


class CountsInGlobal(DrawsInPython):
    def forward(self, x: Tensor) -> Tensor:
        global CALLS
        CALLS += 1
        return self.linear(x) * CALLS


class LogsInGlobal(DrawsInPython):
    def forward(self, x: Tensor) -> Tensor:
        LOG.append(1)
        return self.linear(x) * len(LOG)


class LogsInDefault(DrawsInPython):
    def forward(self, x: Tensor, log: list[int] = []) -> Tensor:  # noqa: B006
        log.append(1)
        return self.linear(x) * len(log)


def _begin() -> None:
    global CALLS
    CALLS = CountsInClass.calls = 0
    LOG.clear()
    LogsInDefault.forward.__defaults__[0].clear()  # pyright: ignore
    random.seed(0)
    np.random.seed(0)


@pytest.mark.parametrize("number", [1, K])
@pytest.mark.parametrize(
    "kind",
    [DrawsInPython, DrawsInNumpy, BranchesAtRandom, CountsInClass, CountsInGlobal, LogsInGlobal, LogsInDefault],
)
def test_what_members_share_goes_on_as_in_the_loop(kind, number):
    nets = [kind().eval() for _ in range(number)]
    x = torch.randn(3, 4)
    with torch.no_grad():
        _begin()
        ensemble = fastens.Ensemble(nets)
        answers = [ensemble(x) for _ in range(4)]
        _begin()
        for answer in answers:
            near(answer, torch.stack([net(x) for net in nets]).mean(0))
    assert "random generators" in ensemble.report().why or "share" in ensemble.report().why


class WritesParameter(nn.Module):
    """Lets a parameter decay at each call."""

    def __init__(self, decaying: nn.Parameter, how: str) -> None:
        super().__init__()
        self.linear, self.decaying, self.how = nn.Linear(4, 4), decaying, how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "data replaced":
            self.decaying.data = self.decaying.data * 0.9
        elif self.how == "data in place":
            self.decaying.data.mul_(0.9)
        elif self.how == "in place":
            with torch.no_grad():
                self.decaying.mul_(0.9)
        else:
            self.decaying = nn.Parameter(self.decaying.detach() * 0.9, self.decaying.requires_grad)
        return self.linear(x) * self.decaying


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("of_members", ["one object", "equal and frozen", "equal"])
@pytest.mark.parametrize("how", ["data replaced", "data in place", "in place", "another parameter"])
def test_what_a_forward_writes_to_parameters_is_each_members(how, of_members, engine, mode):
    def nets() -> list[nn.Module]:
        torch.manual_seed(0)
        made = [nn.Parameter(torch.ones(4), of_members == "equal") for _ in range(K)]
        return [WritesParameter(made[0 if of_members == "one object" else k], how).eval() for k in range(K)]

    theirs, ensemble = nets(), fastens.Ensemble(nets(), engine=engine)
    for _ in range(4):
        x = torch.randn(3, 4)
        with mode():
            answer = ensemble(x)
        with torch.no_grad():
            near(answer.clone(), torch.stack([member(x) for member in theirs]).mean(0))
