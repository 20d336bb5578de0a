"""Deterministic mode: a row has the same bits whatever the batch, its other rows, the threads and the call."""

import threading
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastens
from fastens import reproducible
from fastens.plan.cpu.winograd import squares_of
from tests.fold.test_plan_winograd import convolved
from tests.fuzz.bits import bits, outcome
from tests.networks import NETWORKS, randomised, tensor_of, unet_2d

ROWS = 64
SIZES = (1, 2, 3, 17, 64)
RULES = ["mean", "median", "geometric", "dominant", "max_abs"]


class Rows:
    """The bits that each row had when it was first evaluated."""

    def __init__(self) -> None:
        self.known: dict[int, Tensor] = {}

    def meet(self, order: list[int], out: Tensor) -> None:
        for row, value in zip(order, bits(out), strict=True):
            assert torch.equal(self.known.setdefault(row, value), value), f"row {row} of a batch of {len(order)}"


@pytest.fixture(autouse=True)
def _mode_and_threads():
    threads = torch.get_num_threads()
    with torch.no_grad(), fastens.deterministic():
        yield
    torch.set_num_threads(threads)


def unet() -> nn.Module:
    return unet_2d(True, in_channels=3, out_channels=3)


def members_of(make, dtype: torch.dtype, count: int = 3) -> list[nn.Module]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [randomised(make, seed).to(dtype) for seed in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_batch_gives_a_row_the_same_bits(dtype):
    """First call, second and later ones; batches of one to 64 rows, with other rows beside them; in any order."""
    members, x, t = members_of(unet, dtype), torch.randn(ROWS, 3, 8, 8).to(dtype), torch.arange(ROWS)
    seen = Rows()
    for number in (2, 1):
        torch.set_num_threads(number)
        ens = fastens.Ensemble(members)
        for size in (*SIZES, 2, 1):
            order = torch.randperm(ROWS)[:size].tolist()
            for _ in range(2):
                seen.meet(order, ens(x[order], t[order]).sample)
        assert len(ens.report().plans) == len(SIZES), ens.report()


def test_the_fast_mode_does_not():
    """What the mode is for: were it for nothing, the test above could not fail."""
    members, x, t = members_of(unet, torch.float32), torch.randn(16, 3, 8, 8), torch.arange(16)
    with fastens.deterministic(False):
        ens = fastens.Ensemble(members)
        whole, alone = ens(x, t).sample, ens(x[:1], t[:1]).sample
    assert not torch.equal(whole[:1], alone)


@pytest.mark.parametrize("name", ["mlp", "gru", "vision_blocks", "edm_like"])
def test_networks_that_torch_computes(name):
    """Normalisations, means and convolutions that no step has: row by row, on one thread."""
    make, arguments = NETWORKS[name]
    members, seen = members_of(make, torch.float32, 2), Rows()
    args, kwargs = arguments(5)
    for threads in (2, 1):
        torch.set_num_threads(threads)
        ens = fastens.Ensemble(members)
        for order in ([0, 1, 2, 3, 4], [3], [4, 1], [2, 0, 1]):
            given = [x[order] if x.ndim else x for x in args]
            out = ens(*given, **{k: v[order] if isinstance(v, Tensor) else v for k, v in kwargs.items()})
            seen.meet(order, tensor_of(out))


@pytest.mark.parametrize("seed", [pytest.param(k, marks=pytest.mark.full if k > 4 else ()) for k in range(16)])
def test_random_networks(seed):
    assert outcome(seed)


class Eager(nn.Module):
    """Nothing of it is a step in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(37, 51), nn.GELU(), nn.LayerNorm(51), nn.Linear(51, 37))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layers(x) * t.sigmoid()[:, None]


class Wider(Eager):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(37, 90), nn.SiLU(), nn.Linear(90, 37))


def each(ens: fastens.Ensemble, x: Tensor, t: Tensor, run=None) -> None:
    """Rows alone, in twos and together have the same bits."""
    run, seen = run or ens, Rows()
    for order in (list(range(len(x))), [1], [0], [3, 2], [4, 1, 0]):
        seen.meet(order, run(x[order], t[order]))


@pytest.mark.parametrize(
    "ens",
    [
        lambda: fastens.Ensemble([Eager().double().eval() for _ in range(3)]),
        lambda: fastens.Ensemble([Eager().eval() for _ in range(3)], engine="loop"),
        lambda: fastens.Ensemble([Eager().eval() for _ in range(3)], backend="reference"),
        lambda: fastens.Ensemble([Eager().eval() for _ in range(3)], max_fold=6),
        lambda: fastens.Ensemble([Eager().eval() for _ in range(3)], max_fold=2),
    ],
    ids=["float64", "loop", "reference", "max_fold", "max_fold below K"],
)
def test_every_engine(ens):
    x = torch.randn(5, 37)
    made = ens()
    each(made, x.to(made.dtype), torch.rand(5, dtype=made.dtype))


def test_launches_are_not_taken(monkeypatch):
    """As on a GPU: which of their kernels runs is measured."""
    monkeypatch.setattr("fastens.engine.planned.launches_on", lambda _: True)
    ens = fastens.Ensemble([randomised(Eager, k) for k in range(3)])
    each(ens, torch.randn(5, 37), torch.rand(5))
    assert "deterministic mode" in ens.report().why_no_plan


def test_a_row_that_has_lost_its_plan_warns(monkeypatch):
    """A plan's check looks at numbers, so that it may fail for others: torch answers then, with other bits."""
    ens, x, t = fastens.Ensemble([randomised(Eager, k) for k in range(3)]), torch.randn(1, 37), torch.rand(1)
    ens(x, t)
    ens.refresh()
    monkeypatch.setattr("fastens.engine.planned.beyond_rounding", lambda *_: 1.0)
    with pytest.warns(UserWarning, match="no plan now, and had one"):
        ens(x, t)


@pytest.mark.filterwarnings("ignore:fastens. members are evaluated one by one")
@pytest.mark.parametrize("rule", ["mean", "alternating"])
def test_members_of_different_structure(rule):
    ens = fastens.Ensemble([Eager().eval(), Wider().eval()], rule=rule)

    def run(x: Tensor, t: Tensor) -> Tensor:
        with ens.assigned(torch.arange(len(x)) * 0 + 1) if rule == "mean" else ens.trajectory(len(x), 0):
            return ens(x, t) if rule == "mean" else ens.with_rule("mean")(x, t)

    each(ens, torch.randn(5, 37), torch.rand(5), run)


@pytest.mark.parametrize("rule", [*RULES, "own", "noise"])
def test_every_rule(rule):
    @fastens.rule
    def own(scores: Tensor) -> Tensor:
        return scores.exp().mean(0).log()

    given = own() if rule == "own" else rule
    options = {}
    if rule == "noise":
        given, options = (
            "geometric",
            {"aggregate_in": "epsilon", "prediction": "x0", "schedule": fastens.schedules.EDM()},
        )
    ens = fastens.Ensemble([randomised(Eager, k) for k in range(4)], rule=given, **options)
    each(ens, torch.randn(5, 37), 0.1 + torch.rand(5))
    each(ens, torch.randn(5, 37), 0.1 + torch.rand(5), lambda x, t: ens.forward_with_variance(x, t)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_assigned_rows(dtype):
    """The members of the rows beside a row do not matter, and it has the bits of its member."""
    members, x, t = members_of(unet, dtype), torch.randn(7, 3, 8, 8).to(dtype), torch.arange(7)
    ens, of_row, seen = fastens.Ensemble(members), torch.tensor([0, 2, 1, 1, 0, 2, 2]), Rows()
    for order in ([0, 1, 2, 3, 4, 5, 6], [3], [6, 0], [3, 2, 1], [5], [6, 0]):
        with ens.assigned(of_row[order]):
            seen.meet(order, ens(x[order], t[order]).sample)
    assert ens.report().plans


def test_fixed_and_fresh_masks():
    net = nn.Sequential(nn.Linear(8, 64), nn.SiLU(), nn.Dropout(0.3), nn.Linear(64, 8)).eval()
    for masks in ("fixed", "fresh"):
        ens, x, seen = fastens.MCDropout(net, 4, masks=masks), torch.randn(9, 8), Rows()
        for size in (9, 1, 4, 9):
            with ens.trajectory(size, 3):
                seen.meet(list(range(size)), ens(x[:size]))


def test_numbers_among_the_arguments():
    """Whether a time came once or often does not matter: a plan has it as an input from the first call on."""

    class Timed(Eager):
        def forward(self, x: Tensor, t: Any) -> Tensor:
            return self.layers(x) * torch.sigmoid(torch.full((len(x), 1), 0.3 * t))

    ens, x, seen = fastens.Ensemble([randomised(Timed, k) for k in range(3)]), torch.randn(5, 37), Rows()
    for t in (0.5, 0.25, 0.5, 0.75, 0.5):
        for order in ([0, 1, 2, 3, 4], [2], [4, 3]):
            out = ens(x[order], t)
            if t == 0.5:
                seen.meet(order, out)


def test_weights_that_change_from_call_to_call():
    """A plan is made for every weights, where the fast mode waits until they stay."""
    members, x, t = [randomised(Eager, k) for k in range(3)], torch.randn(5, 37), torch.rand(5)
    ens = fastens.Ensemble(members)
    for _ in range(5):
        for parameter in ens.parameters():
            parameter.mul_(1.0625)
        first = ens(x, t)
        assert torch.equal(bits(first), bits(ens(x, t)))
        assert torch.equal(bits(first[3:4]), bits(ens(x[3:4], t[3:4])))


def test_layouts_of_the_batch():
    members, x, t = members_of(unet, torch.float32), torch.randn(4, 3, 8, 8), torch.arange(4)
    ens, seen = fastens.Ensemble(members), Rows()
    wide = torch.randn(4, 3, 8, 17)
    wide[..., 1::2] = x
    for given in (x, x.contiguous(memory_format=torch.channels_last), wide[..., 1::2]):
        for order in ([0, 1, 2, 3], [2]):
            seen.meet(order, ens(given[order[0] : order[-1] + 1], t[order]).sample)


# What cannot keep the promise


class Mixing(Eager):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, t) - x.mean(0)


class Noisy(Eager):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, t) + torch.randn_like(x)


class NumPys(Eager):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, t) + float(np.random.rand())


class Writing(Eager):
    """To a buffer that does not begin at a cache line, in members but the first."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.mean.add_(1)
        return super().forward(x, t) * self.mean[0]


class Counting(Eager):
    calls = 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x, t) * self.calls


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Mixing, "depends on other rows"),
        (Noisy, "random numbers"),
        (NumPys, "random numbers|depends on other rows"),
        (Counting, "writes to itself"),
        (Writing, "writes to itself"),
    ],
)
@pytest.mark.parametrize("how", ["fold", "loop", "modules"])
@pytest.mark.filterwarnings("ignore:fastens. members are evaluated one by one")
def test_what_has_no_rows_of_its_own_raises(kind, why, how):
    members, x, t = [kind().eval() for _ in range(2)], torch.randn(3, 37), torch.rand(3)
    if how == "modules":
        members.append(Wider().eval())
    ens = fastens.Ensemble(members, engine="loop" if how == "loop" else "auto")
    with pytest.raises(reproducible.NotReproducible, match=why):
        ens(x, t)
    with fastens.deterministic(False):
        assert ens(x, t).shape == x.shape


def test_a_shift_by_the_batch_raises():
    ens = fastens.Ensemble([randomised(Eager, k) for k in range(3)], rule=fastens.rules.Geometric(shift="batch"))
    with pytest.raises(reproducible.NotReproducible, match="shifts a row by other rows"):
        ens(torch.randn(3, 37), torch.rand(3))


def test_transforms_and_compilers():
    ens, x, t = fastens.Ensemble([randomised(Eager, k) for k in range(2)]), torch.randn(3, 37), torch.rand(3)
    with pytest.raises(reproducible.NotReproducible, match="rows are not seen"):
        torch.func.vmap(lambda x: ens(x, t))(x[None])
    with pytest.raises(Exception, match="deterministic mode is on"):
        torch.compile(lambda x, t: ens(x, t), fullgraph=True, backend="eager")(x, t)
    assert torch.equal(torch.compile(lambda x, t: ens(x, t), backend="eager")(x, t), ens(x, t))


def test_beside_torchs_own_mode():
    """Which is about one run and the next, and fills what is allocated."""
    ens, x, t = fastens.Ensemble([randomised(Eager, k) for k in range(2)]), torch.randn(3, 37), torch.rand(3)
    before = ens(x, t)
    torch.use_deterministic_algorithms(True)
    try:
        each(ens, x.repeat(2, 1), t.repeat(2))
        assert torch.equal(bits(ens(x, t)), bits(before))
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_plan_with_other_bits_is_not_taken(monkeypatch):
    """Whatever makes a plan of several rows another: here the choice of Winograd's squares by the batch."""
    monkeypatch.setattr(
        "fastens.plan.cpu.convolution.squares_of",
        lambda shape, threads, _: 0 if shape.rows_of_run > 1 else squares_of(shape, 2, True),
    )
    members, x, t = members_of(unet, torch.float32), torch.randn(4, 3, 8, 8), torch.arange(4)
    ens, seen = fastens.Ensemble(members), Rows()
    for order in ([0, 1, 2, 3], [1], [0, 1, 2, 3]):
        seen.meet(order, ens(x[order], t[order]).sample)
    assert len(ens.report().plans) == 1
    assert "other bits" in ens.report().why_no_plan


# The setting


def test_a_block_is_its_threads_own_and_a_setting_everybodys():
    seen = {}

    def look(name: str) -> None:
        thread = threading.Thread(target=lambda: seen.update({name: reproducible.enabled()}))
        thread.start()
        thread.join()

    look("beside a block")
    try:
        fastens.deterministic(True)
        look("setting")
        with fastens.deterministic(False):
            assert not reproducible.enabled()
            look("beside a block that puts it off")
    finally:
        fastens.deterministic(False)
    assert reproducible.enabled()  # the block of the fixture
    assert seen == {"beside a block": False, "setting": True, "beside a block that puts it off": True}


@pytest.mark.parametrize("size", [4, 8, 16, 32])
@pytest.mark.parametrize("channels", [16, 64, 256])
def test_winograd_is_chosen_by_one_row(size, channels):
    for given in (False, True):
        found = {
            squares_of(convolved(rows, size, channels, channels, given=given), threads, True)
            for rows in (1, 4, 64)
            for threads in (1, 2)
        }
        assert len(found) == 1
