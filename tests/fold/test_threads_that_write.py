"""Threads that call members whose code keeps state: what a call writes stays, and none sees a first pass of another."""

import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastens
from tests.fold.test_contract_threads import together

K, THREADS, CALLS = 3, 4, 6
ENGINES = pytest.mark.parametrize("engine", ["auto", "loop"])
GRADIENTS = pytest.mark.parametrize("grad", [False, True])
pytestmark = pytest.mark.filterwarnings("ignore:fastens. members are evaluated one by one")


@pytest.fixture(autouse=True)
def often():
    """Let threads take turns often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


class Network(nn.Module):
    layer: nn.Linear
    count: torch.Tensor

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.number, self.scale, self.seen = 0, None, []
        self.register_buffer("count", torch.zeros(()))

    def calls(self) -> int:
        return 0


class Attribute(Network):
    def forward(self, x):
        self.number += 1
        return self.layer(x)

    def calls(self):
        return self.number


class Buffer(Network):
    def forward(self, x):
        self.count.add_(1)
        return self.layer(x)

    def calls(self):
        return int(self.count)


class InList(Network):
    def forward(self, x):
        self.seen.append(1)
        return self.layer(x)

    def calls(self):
        return len(self.seen)


class Lazy(Network):
    def forward(self, x):
        if self.scale is None:
            self.scale = torch.full((4,), 2.0)
        return self.layer(x) * self.scale


class EachThread(Network):
    def __init__(self):
        super().__init__()
        self.kept = threading.local()

    def forward(self, x):
        self.kept.number = getattr(self.kept, "number", 0) + 1
        return self.layer(x) * self.kept.number


def made(cls: Any) -> list[Any]:
    torch.manual_seed(0)
    return [cls().eval() for _ in range(K)]


@ENGINES
@GRADIENTS
@pytest.mark.parametrize("cls", [Attribute, Buffer, InList, Lazy, EachThread])
def test_threads_at_once(cls, engine, grad):
    for _ in range(3):
        ensemble, references, lock = fastens.Ensemble(made(cls), engine=engine), made(cls), threading.Lock()

        def work(i, ensemble=ensemble, references=references, lock=lock):
            generator = torch.Generator().manual_seed(i)
            with torch.set_grad_enabled(grad):
                for call in range(CALLS):
                    x = torch.randn(3 + call % 2, 4, generator=generator)
                    found = ensemble(x)
                    with lock:
                        expected = torch.stack([each(x) for each in references]).mean(0)
                    torch.testing.assert_close(found, expected)

        together(work, THREADS)
        members: Any = ensemble.members
        assert [each.calls() for each in members] == [each.calls() for each in references]


@pytest.mark.parametrize("assigned", [False, True])
@pytest.mark.parametrize("lazily", [False, True])
def test_what_a_thread_keeps_outlives_what_another_finds(assigned, lazily):
    """Where a call that reads values made a loop of a fold, it began with what one thread keeps."""

    class Kept(EachThread):
        def __init__(self):
            super().__init__()
            if lazily:
                del self.kept

        def forward(self, x, reads=False):
            if "kept" not in vars(self):
                self.kept = threading.local()
            out = EachThread.forward(self, x)
            return out * 2 if reads and float(out.detach().sum()) > -1e6 else out

    ensemble, references = fastens.Ensemble(made(Kept)), made(Kept)
    dealt = [0, 1, 2]

    def call(reads):
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
        outputs = [each(x, reads) for each in references]
        if not assigned:
            torch.testing.assert_close(ensemble(x, reads), torch.stack(outputs).mean(0))
            return
        with ensemble.assigned(dealt):
            torch.testing.assert_close(ensemble(x, reads), torch.stack([outputs[k][i] for i, k in enumerate(dealt)]))

    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        for thread, reads in ((one, False), (one, False), (other, False), (other, True), (one, False), (other, False)):
            thread.submit(call, reads).result()


class Outer(nn.Module):
    """Has an ensemble inside, which others call by itself."""

    inner: Any

    def __init__(self, inner):
        super().__init__()
        self.layer, self.number = nn.Linear(4, 4), 0
        self.__dict__["inner"] = inner  # of which no part is the member's

    def forward(self, x):
        self.number += 1
        return self.layer(self.inner(x))


@ENGINES
def test_ensembles_inside_of_members_and_backward_passes(engine):
    """No two wait for each other, whoever calls what, in what mode, and from where."""
    inner = fastens.Ensemble(made(Attribute), engine=engine)
    torch.manual_seed(1)
    outer = fastens.Ensemble([Outer(inner) for _ in range(K)], engine="loop")

    def work(i):
        for call in range(CALLS):
            x = torch.randn(3 + call % 2, 4, requires_grad=True)
            with fastens.deterministic(False):
                ensemble = (inner, outer)[(i + call) % 2]
                checkpoint(ensemble, x, use_reentrant=call % 3 == 0).sum().backward()
            assert x.grad is not None

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)


def test_a_plan_waits_for_nobody(monkeypatch):
    """Its replay runs no code of members, also while another thread is in such code; audits do."""
    monkeypatch.setenv("FASTENS_AUDIT", "never")
    inside, leave = threading.Event(), threading.Event()

    class Waiting(Network):
        def forward(self, x, wait=False):
            if wait and not leave.is_set():
                inside.set()
                leave.wait(30)
            return self.layer(x)

    ensemble, x = fastens.Ensemble(made(Waiting)), torch.randn(3, 4)
    with torch.no_grad():
        expected = ensemble(x)
        waiting = threading.Thread(target=lambda: ensemble(torch.randn(5, 4), True), daemon=True)
        waiting.start()
        assert inside.wait(30)
        found: list[torch.Tensor] = []

        def replay():
            with torch.no_grad():
                found.extend(ensemble(x) for _ in range(2))

        replaying = threading.Thread(target=replay, daemon=True)
        replaying.start()
        replaying.join(20)
        waited = replaying.is_alive()
        leave.set()
        waiting.join(30)
    assert not waited
    assert not waiting.is_alive()
    torch.testing.assert_close(found, [expected] * 2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system forks no process")
def test_a_forked_process_has_its_own_turns():
    """Also where another thread was in a call, of which there is nothing in the child."""
    ensemble = fastens.Ensemble([Attribute() for _ in range(K)])
    inside, done = threading.Event(), threading.Event()

    def hold():
        with ensemble._engine.turn():
            inside.set()
            done.wait()

    other = threading.Thread(target=hold)
    other.start()
    inside.wait()
    child = os.fork()
    if not child:
        signal.alarm(20)
        with ensemble._engine.turn():
            os._exit(0)
    done.set()
    other.join()
    assert os.waitpid(child, 0)[1] == 0
