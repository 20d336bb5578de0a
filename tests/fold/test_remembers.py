"""Networks that remember: caches, counters, last activations; what each member remembers is its own."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import fastens
from tests.fold.contract import K, averaged, batch, made, near

pytestmark = pytest.mark.filterwarnings("ignore:fastens")


class Remembers(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.begin()

    def begin(self):
        pass


class Counts(Remembers):
    def begin(self):
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.linear(x) * self.calls


class CountsInBuffer(Remembers):
    def begin(self):
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.linear(x) * self.calls


class CountsInParameter(Remembers):
    def begin(self):
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        self.scale.data = self.scale.data * 0.9
        return self.linear(x) * self.scale


class Appends(Remembers):
    def begin(self):
        self.history = []

    def forward(self, x):
        self.history.append(x.sum())
        return self.linear(x) * (1 + torch.stack(self.history).sum().tanh())


class RemembersActivation(Remembers):
    def begin(self):
        self.last = 0

    def forward(self, x):
        y = self.linear(x) + self.last
        self.last = y.detach()
        return y


class RemembersInBuffer(Remembers):
    """Of another shape than it began with."""

    def begin(self):
        self.register_buffer("last", torch.zeros(1, 4))

    def forward(self, x):
        y = self.linear(x) + self.last.mean(0)
        self.last = y.detach()
        return y


class CachesByMember(Remembers):
    def begin(self):
        self.gain = None

    def forward(self, x):
        if self.gain is None:
            self.gain = self.linear.weight.detach().sum(0)
        return self.linear(x) * self.gain


class CachesInDictionary(Remembers):
    def begin(self):
        self.kept = {}

    def forward(self, x):
        if "gain" not in self.kept:
            self.kept["gain"] = self.linear.weight.detach().sum(0)
        return self.linear(x) * self.kept["gain"]


class CachesTable(Remembers):
    def begin(self):
        self.table = None

    def forward(self, x):
        if self.table is None:
            self.table = torch.arange(4.0).to(x)
        return self.linear(x) * self.table


class CachesBuffer(Remembers):
    def begin(self):
        self.register_buffer("table", None, persistent=False)

    def forward(self, x):
        if self.table is None:
            self.table = torch.arange(4.0).to(x)
        return self.linear(x) * self.table


class CacheGrows(Remembers):
    def begin(self):
        self.register_buffer("table", torch.ones(1), persistent=False)

    def forward(self, x):
        if len(self.table) < len(x):
            self.table = torch.arange(len(x)).to(x)
        return self.linear(x) * self.table[: len(x), None]


class SetUpByFirstBatch(Remembers):
    def begin(self):
        self.scale = None

    def forward(self, x):
        if self.scale is None:
            self.scale = x.abs().mean()
        return self.linear(x) / self.scale


CACHES = [CachesByMember, CachesInDictionary, CachesTable, CachesBuffer, CacheGrows]
KINDS = [
    Counts,
    CountsInBuffer,
    CountsInParameter,
    Appends,
    RemembersActivation,
    RemembersInBuffer,
    SetUpByFirstBatch,
    *CACHES,
]
INPUT = batch(6, 4)


def both(kind: type[Remembers], **options) -> tuple[fastens.Ensemble, list[nn.Module]]:
    def make(k: int) -> nn.Module:
        return made(lambda _: kind(), k)

    return fastens.Ensemble([make(k) for k in range(K)], **options), [make(k) for k in range(K)]


@pytest.fixture
def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [INPUT(generator)[0] for _ in range(6)]


@pytest.mark.parametrize("first", ["all members", "assigned rows"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_advance_the_members_that_they_are_assigned_to_and_no_other(kind, first, inputs):
    ensemble, members = both(kind)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for i, x in enumerate(inputs):
            if first == "all members" and i % 2 == 0:
                near(ensemble(x), averaged([m(x) for m in members]))
            to = torch.randint(0, K - i % 2, (6,), generator=generator)
            with ensemble.assigned(to):
                found = ensemble(x)
            answers = {k: members[k](x) for k in set(to.tolist())}
            near(found, torch.stack([answers[k][row] for row, k in enumerate(to.tolist())]))
    settled = kind in CACHES or (kind is SetUpByFirstBatch and first == "all members")
    assert ensemble.engine == ("fold" if settled else "loop")


CHANGES = {
    "nothing": lambda ensemble: ensemble,
    "deepcopy": copy.deepcopy,
    "pickle": lambda ensemble: pickle.loads(pickle.dumps(ensemble)),
    "refresh": lambda ensemble: ensemble.refresh() or ensemble,
    "double and back": lambda ensemble: ensemble.double().float(),
    "an attribute": lambda ensemble: setattr(ensemble.network, "other", 1) or ensemble,
}


@pytest.mark.covering(2)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_members_remember_outlasts(kind, engine, change, inputs):
    ensemble, members = both(kind, engine=engine)
    with torch.no_grad():
        for x in inputs[:3]:
            near(ensemble(x), averaged([m(x) for m in members]))
            ensemble = CHANGES[change](ensemble)
            for k, own in enumerate(copy.deepcopy(members)):
                near(ensemble.members[k](x), own(x))


def test_an_attribute_that_is_set_is_every_members(inputs):
    ensemble, members = both(Counts, engine="loop")
    with torch.no_grad():
        ensemble(inputs[0])
        ensemble.calls = 0
        near(ensemble(inputs[0]), averaged([m(inputs[0]) for m in members]))


class NotDifferentiated(Counts):
    """Has no fold where gradients are asked for, which shows when the pass has counted already."""

    def forward(self, x):
        return torch.vmap(lambda row: torch.tanh(row) * row.sum())(super().forward(x))


def test_a_fold_that_fails_leaves_nothing_behind(inputs):
    ensemble, members = both(NotDifferentiated)
    for x in inputs[:3]:
        near(ensemble(x), averaged([m(x) for m in members]))
    assert ensemble.engine == "loop"


@pytest.mark.parametrize("engine", ["fold", "loop"])
@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind is not CountsInParameter]
)  # they have one set of weights
def test_dropout_masks_have_a_memory_each(kind, engine, inputs):
    network = nn.Sequential(nn.Dropout(0.5), made(lambda _: kind(), 0))
    ensemble = fastens.MCDropout(network, K, engine=engine)
    members = [ensemble.members[k] for k in range(K)]
    with torch.no_grad():
        for x in inputs[:3]:
            near(ensemble(x), averaged([m(x) for m in members]))
            again = copy.deepcopy(members)
            for k in range(K):
                near(ensemble.members[k](x), again[k](x))


def test_a_copy_of_a_masked_member_has_its_masks(inputs):
    member = fastens.MCDropout(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), K).members[1]
    for other in (copy.deepcopy(member), pickle.loads(pickle.dumps(member))):
        assert torch.equal(other(inputs[0]), member(inputs[0]))


class MixesWeakly(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x) + 1e-3 * x.mean(0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_that_are_mixed_a_little_are_not_dealt_out(dtype, inputs):
    members = [made(lambda _: MixesWeakly(), k).to(dtype) for k in range(K)]
    ensemble, x = fastens.Ensemble(members), inputs[0].to(dtype)
    to = torch.tensor([0, 1, 2, 0, 1, 2])
    with torch.no_grad(), ensemble.assigned(to):
        found = ensemble(x)
        assert torch.equal(found, torch.stack([members[k](x)[row] for row, k in enumerate(to.tolist())]))


class MakesTensors(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x) + torch.ones(4)


def test_a_default_dtype_is_part_of_what_a_plan_rests_on(inputs):
    members = [made(lambda _: MakesTensors(), k) for k in range(K)]
    ensemble, x = fastens.Ensemble(members), inputs[0]
    try:
        with torch.no_grad():
            for dtype in (torch.float32, torch.float64, torch.float32):
                torch.set_default_dtype(dtype)
                for _ in range(3):
                    near(ensemble(x), averaged([m(x) for m in members]))
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_buffer_that_inference_mode_saw_first_can_be_written_outside_it(inputs):
    ensemble, members = both(CountsInBuffer)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            near(ensemble(inputs[0]), averaged([m(inputs[0]) for m in members]))


class Resets(Remembers):
    """Has a method that sets its state, and one that tells it."""

    def begin(self):
        self.register_buffer("count", torch.zeros(()))
        self.reset()

    def reset(self):
        self.count.zero_()
        self.calls, self.kept = 0, []
        return self

    def number(self):
        return self.calls

    def forward(self, x):
        self.count += 1
        self.calls += 1
        self.kept.append(self.calls)
        return self.linear(x) * self.count + self.calls + len(self.kept)


@pytest.mark.parametrize("engine", ["auto", "loop"])
def test_methods_that_set_state_reach_what_members_wrote_to_themselves(engine, inputs):
    members = [made(lambda _: Resets(), k) for k in range(K)]
    ensemble = fastens.Ensemble([made(lambda _: Resets(), k) for k in range(K)], engine=engine)
    with torch.no_grad():
        for reset in (False, False, True, False):
            if reset:
                assert ensemble.number() == 2
                assert ensemble.reset() is ensemble
                for m in members:
                    m.reset()
            near(ensemble(inputs[0]), averaged([m(inputs[0]) for m in members]))
        ensemble.calls = 0  # the value that the network was made with
        for m in members:
            m.calls = 0
        near(ensemble(inputs[0]), averaged([m(inputs[0]) for m in members]))


class RemembersLate(Remembers):
    """Writes to itself in a branch that first calls do not take, and may ask then for what differs between members."""

    def begin(self):
        self.register_buffer("count", torch.ones(()))
        self.calls, self.last = 0, 0.0

    def forward(self, x, late, reads):
        h = self.linear(x)
        if late > 0:
            self.count += 1
            self.calls += 1
            h, self.last = h + self.last, h.detach().sum() * 0.1
            if reads > 0 and h.sum() > 0:
                h = -h
        return h * self.count + self.calls


@pytest.mark.parametrize("rows", [None, [0, 1, 1, 0]], ids=["all", "rows"])
@pytest.mark.parametrize("reads", [0, 1])
def test_state_that_is_first_written_in_a_later_branch(reads, rows):
    members = [made(lambda _: RemembersLate(), k) for k in range(K)]
    ensemble = fastens.Ensemble([made(lambda _: RemembersLate(), k) for k in range(K)])
    with torch.no_grad():
        for late in (0, 0, 0, 1, 1, 0, 1):
            args = torch.randn(4, 4), torch.tensor(late), torch.tensor(reads)
            if rows is None:
                near(ensemble(*args), averaged([m(*args) for m in members]))
                continue
            theirs = {k: members[k](*args) for k in sorted(set(rows))}
            with ensemble.assigned(rows):
                near(ensemble(*args), torch.stack([theirs[k][i] for i, k in enumerate(rows)]))


@pytest.mark.parametrize("by_method", [False, True])
def test_an_attribute_of_looped_members_reads_as_it_was_set(by_method, inputs):
    class Scaled(Counts):
        def set_scale(self, value):
            self.scale = value

    members = [made(lambda _: Scaled(), k) for k in range(K)]
    ensemble = fastens.Ensemble(members, engine="loop")
    with torch.no_grad():
        ensemble(inputs[0])
    assert ensemble.calls == 1
    ensemble.set_scale(0.5) if by_method else setattr(ensemble, "scale", 0.5)
    assert ensemble.scale == 0.5
