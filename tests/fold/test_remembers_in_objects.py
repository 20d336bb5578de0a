"""Networks that write to objects that they hold: what each member writes is its own."""

import types

import pytest
import torch

import fastens
from tests.fold.contract import K, averaged, batch, made, near
from tests.fold.test_remembers import Remembers

pytestmark = pytest.mark.filterwarnings("ignore:fastens")


class Record:
    """An object of a user's, held by a module."""

    def __init__(self):
        self.calls, self.nested, self.seen = 0, types.SimpleNamespace(counts={"calls": [0]}), []


class InAnObject(Remembers):
    def begin(self):
        self.record = Record()


class CountsInAnObject(InAnObject):
    def forward(self, x):
        self.record.calls += 1
        return self.linear(x) * self.record.calls


class CountsDeepInAnObject(InAnObject):
    def forward(self, x):
        counts = self.record.nested.counts["calls"]
        counts[0] += 1
        return self.linear(x) * counts[0]


class KeepsTensorsInAnObject(InAnObject):
    def forward(self, x):
        h = self.linear(x)
        self.record.seen.append(h.detach().mean())
        return h + sum(self.record.seen)


class KeepsAnAttributeOfAnObject(InAnObject):
    def forward(self, x):
        h = self.linear(x)
        last, self.record.last = getattr(self.record, "last", 0), h.detach().mean()
        return h + last


@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize(
    "kind", [CountsInAnObject, CountsDeepInAnObject, KeepsTensorsInAnObject, KeepsAnAttributeOfAnObject]
)
def test_what_members_write_to_objects_that_they_hold(kind, engine):
    members = [made(lambda _: kind(), k) for k in range(K)]
    ensemble = fastens.Ensemble([made(lambda _: kind(), k) for k in range(K)], engine=engine)
    generator = torch.Generator().manual_seed(0)
    for differentiated in (False, True, False):
        with torch.set_grad_enabled(differentiated):
            for _ in range(2):
                (x,) = batch(5, 4)(generator)
                near(ensemble(x), averaged([member(x) for member in members]))
