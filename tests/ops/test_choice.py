"""The choice among ways to compute an op, with a clock that tells the time it is told, and the ways of convolution."""

import itertools
import json

import pytest
import torch
from torch import nn

import fastens
from fastens.ops import _choice, conv
from fastens.ops._choice import Choice, Table, Way
from fastens.ops._clock import clock, repetitions
from tests.tolerances import OP, relative_error

CPU = torch.device("cpu")
X = torch.arange(6.0)


class FakeClock:
    """Each way takes the seconds it was given; what was timed is counted."""

    def __init__(self, seconds):
        self.seconds, self.timed = seconds, []

    def __call__(self, run, device):
        name = run.func.__name__

        def time():
            self.timed.append(name)
            return self.seconds[name]

        return time


def slow(x):
    return x + 1


def fast(x):
    return 1 + x


def slowest(x):
    return x + 1


WAYS_AND_ONE = {"slow": Way(slow), "fast": Way(fast), "slowest": Way(slowest)}


def wrong(x):
    return x + 2


def broken(x):
    raise RuntimeError("no workspace")


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    monkeypatch.setattr(_choice, "CHOICES", {})
    monkeypatch.delenv("FASTENS_CHOOSE", raising=False)


def choice(path, seconds=None, **ways):
    ways = ways or {"slow": Way(slow), "fast": Way(fast)}
    timer = FakeClock(seconds or {"slow": 2e-3, "fast": 1e-3, "wrong": 1e-6, "broken": 1e-6})
    return Choice("add", lambda x: str(list(x.shape)), ways, table=Table(path), clock=timer, devices=("cpu",))


@torch.no_grad()
def test_the_fastest_is_measured_once_and_remembered(tmp_path):
    path = tmp_path / "deep" / "choices.json"
    add = choice(path)
    assert [add.choose((X,), CPU) for _ in range(3)] == ["fast"] * 3
    assert len(add.clock.timed) == 2 * _choice.ROUNDS
    assert add.clock.timed[:2] == ["slow", "fast"]  # interleaved
    entry = json.loads(path.read_text())["cpu"]["add"]["[6]"]
    assert entry["chosen"] == "fast"
    assert entry["seconds"] == {"slow": 2e-3, "fast": 1e-3}
    assert entry["torch"] == torch.__version__
    later = choice(path)  # another process
    assert later.choose((X,), CPU) == "fast"
    assert not later.clock.timed
    assert later.choose((X[:3],), CPU) == "fast"  # another shape
    assert later.clock.timed
    assert later.table.summary() == {("cpu", "add"): {"fast": 2}}


@torch.no_grad()
@pytest.mark.parametrize(("between", "rounds"), [(0.0, _choice.ROUNDS), (0.1, 4), (1.0, _choice.FEWEST_ROUNDS)])
def test_a_measurement_has_a_budget(tmp_path, monkeypatch, between, rounds):
    now = itertools.count()
    monkeypatch.setattr(_choice.time, "monotonic", lambda: between * next(now))  # the first rounds are not asked for
    add = choice(tmp_path / "choices.json")
    add.measure((X,), CPU)
    assert len(add.clock.timed) == 2 * rounds


@torch.no_grad()
def test_a_hopeless_way_is_timed_once(tmp_path):
    add = choice(tmp_path / "choices.json", {"slow": 1.1e-3, "fast": 1e-3, "slowest": 3e-3}, **WAYS_AND_ONE)
    entry = add.measure((X,), CPU)
    assert add.clock.timed.count("slowest") == 1
    assert add.clock.timed.count("slow") == _choice.ROUNDS
    assert (entry["chosen"], entry["seconds"]["slowest"]) == ("fast", 3e-3)
    alone = choice(tmp_path / "others.json", {"slow": 9e-3, "fast": 1e-3, "slowest": 3e-3}, **WAYS_AND_ONE)
    assert alone.measure((X,), CPU)["chosen"] == "fast"
    assert len(alone.clock.timed) == 3  # one is left


@pytest.mark.parametrize(("seconds", "number"), [(0.0, 10), (1e-6, 10), (3e-4, 4), (1e-3, 1), (2.0, 1)])
def test_a_timing_has_fewer_calls_where_one_takes_long(seconds, number):
    assert repetitions(seconds) == number


@torch.no_grad()
def test_noise_does_not_choose(tmp_path):
    assert choice(tmp_path / "a", {"slow": 1e-3, "fast": 0.98e-3}).choose((X,), CPU) == "slow"
    assert choice(tmp_path / "b", {"slow": 1e-3, "fast": 0.96e-3}).choose((X,), CPU) == "fast"


class OutOfResources(Exception):
    """As Triton's, which is no RuntimeError."""


def too_large(x):
    raise OutOfResources("shared memory")


@torch.no_grad()
def test_ways_that_fail_or_disagree_are_never_chosen(tmp_path):
    ways = {"slow": Way(slow), "wrong": Way(wrong), "broken": Way(broken), "odd": Way(fast, lambda x: "never")}
    add = choice(tmp_path / "choices.json", **ways, large=Way(too_large))
    assert add.choose((X,), CPU) == "slow"
    failed = add.table.find("cpu", "add", "[6]")["failed"]
    assert set(failed) == {"wrong", "broken", "large"}
    assert "relative error" in failed["wrong"]
    assert "no workspace" in failed["broken"]
    assert failed["large"] == "OutOfResources: shared memory"
    bad = X.clone()
    bad[2] = torch.nan
    assert _choice._disagreement(fast(bad), slow(bad)) is None
    assert _choice._disagreement(fast(bad), slow(X)) is not None
    assert _choice._disagreement(slow(X)[:2], slow(X)) is not None


@torch.no_grad()
def test_forced_by_argument_and_by_environment(tmp_path, monkeypatch):
    ways = {"slow": Way(slow), "fast": Way(fast, lambda x: None if len(x) > 3 else "too short")}
    add = choice(tmp_path / "choices.json", **ways)
    assert add.choose((X,), CPU, "slow") == "slow"
    with pytest.raises(ValueError, match="too short"):
        add.choose((X[:2],), CPU, "fast")
    with pytest.raises(ValueError, match="'quick' is unknown"):
        add.choose((X,), CPU, "quick")
    monkeypatch.setenv("FASTENS_CHOOSE", "other=x, add=fast")
    assert add.choose((X,), CPU) == "fast"
    assert add.choose((X[:2],), CPU) == "slow"  # where it cannot be taken
    assert not add.clock.timed


def test_nothing_is_measured_where_that_makes_no_sense(tmp_path):
    add = choice(tmp_path / "choices.json")
    assert add.choose((X,), CPU) == "slow"  # derivatives may be wanted
    with torch.no_grad():
        assert add.choose((X,), torch.device("meta")) == "slow"
        torch.func.vmap(lambda x: x if add.choose((x,), CPU) == "slow" else None)(X[:, None])
        torch.compiler.reset()
        compiled = torch.compile(lambda x: add.ways[add.choose((x,), CPU)].run(x), fullgraph=True, backend="eager")
        assert torch.equal(compiled(X), slow(X))
    assert not add.clock.timed
    assert not (tmp_path / "choices.json").exists()


@torch.no_grad()
def test_tables_that_are_damaged_foreign_or_not_writable(tmp_path):
    path = tmp_path / "choices.json"
    path.write_text("{ no JSON")
    assert choice(path).choose((X,), CPU) == "fast"
    content = json.loads(path.read_text())
    content["cpu"]["add"]["[6]"]["chosen"] = "a way of a later version"
    content["NVIDIA H200"] = {"conv": {"key": {"chosen": "members"}}}
    path.write_text(json.dumps(content))
    assert choice(path).choose((X,), CPU) == "slow"
    assert choice(path).choose((X[:2],), CPU) == "fast"
    assert json.loads(path.read_text())["NVIDIA H200"] == content["NVIDIA H200"]  # others' entries stay
    (tmp_path / "file").write_text("")
    assert choice(tmp_path / "file" / "choices.json").choose((X,), CPU) == "fast"


@torch.no_grad()
def test_shipped_tables_are_read_and_the_users_wins(tmp_path, monkeypatch):
    shipped = tmp_path / "measured"
    shipped.mkdir()
    entry = {"cpu": {"add": {"[6]": {"chosen": "fast"}}}}
    (shipped / "cpu.json").write_text(json.dumps(entry))
    add = choice(None)
    monkeypatch.setenv("FASTENS_CACHE", str(tmp_path / "user"))
    add.table = Table(None, shipped)
    assert add.choose((X,), CPU) == "fast"
    assert not add.clock.timed
    add.table.add("cpu", "add", "[6]", {"chosen": "slow"})
    add.forget()
    assert add.choose((X,), CPU) == "slow"
    assert json.loads((tmp_path / "user" / "choices.json").read_text()) == {"cpu": {"add": {"[6]": {"chosen": "slow"}}}}
    assert json.loads((shipped / "cpu.json").read_text()) == entry


def test_the_clock_of_the_host_tells_seconds():
    assert 0 < clock(lambda: torch.ones(1000), CPU)() < 1


CASES = {  # x [K*B, ...] of K = 3, kernel, what is passed on
    "3x3": ((6, 4, 7, 6), (3, 8, 4, 3, 3), ((1, 1), (1, 1), (1, 1), False, (0, 0), 1)),
    "stride": ((3, 4, 7, 6), (3, 8, 2, 3, 2), ((2, 1), (1, 0), (1, 2), False, (0, 0), 2)),
    "1x1": ((6, 5, 4, 3), (3, 7, 5, 1, 1), ((1, 1), (0, 0), (1, 1), False, (0, 0), 1)),
    "1x1 of one row": ((3, 5, 4, 3), (3, 7, 5, 1, 1), ((1, 1), (0, 0), (1, 1), False, (0, 0), 1)),
    "1d": ((6, 5, 9), (3, 4, 5, 3), ((2,), (1,), (1,), False, (0,), 1)),
    "1d, 1": ((3, 5, 9), (3, 4, 5, 1), ((1,), (0,), (1,), False, (0,), 1)),
    "3d": ((6, 2, 3, 4, 3), (3, 4, 2, 3, 1, 1), ((1, 1, 1), (1, 0, 0), (1, 1, 1), False, (0, 0, 0), 1)),
    "transposed": ((6, 4, 5, 6), (3, 4, 6, 3, 3), ((2, 2), (1, 1), (1, 1), True, (1, 0), 1)),
    "no rows": ((0, 4, 7, 6), (3, 8, 4, 3, 3), ((1, 1), (1, 1), (1, 1), False, (0, 0), 1)),
}


@pytest.mark.parametrize("layout", ["channels first", "channels last"])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_every_way_of_convolution_is_the_same_convolution(name, biased, layout):
    torch.manual_seed(0)
    shape, kernel, settings = CASES[name]
    x, weight = torch.randn(shape), torch.randn(kernel)
    if layout == "channels last":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    channels = kernel[2] if settings[3] else kernel[1]
    bias = torch.randn(3, channels) if biased else None
    expected = conv.conv(x, weight, bias, *settings, way="members")
    taken = []
    for way in ("grouped", "matmul"):
        if conv.CHOICE.ways[way].refuses(x, weight, bias, *settings, None) is not None:
            with pytest.raises(ValueError, match="does not take"):
                conv.conv(x, weight, bias, *settings, way=way)
            continue
        taken.append(way)
        actual = conv.conv(x, weight, bias, *settings, way=way)
        assert relative_error(actual, expected) <= OP[torch.float32]
        assert (actual.movedim(1, -1) if layout == "channels last" else actual).is_contiguous()
        doubles = [t.double().requires_grad_() for t in (x[:3], weight, bias) if t is not None]
        assert torch.autograd.gradcheck(
            lambda x, w, b=None, way=way: conv.conv(x, w, b, *settings, way=way), doubles, fast_mode=True
        )
    plain_1x1 = name.startswith(("1x1", "1d, 1"))
    assert ("grouped" in taken) is (name != "no rows")
    assert ("matmul" in taken) is (plain_1x1 and (layout == "channels last" or "one row" in name or name == "1d, 1"))


def test_ragged_groups_and_one_member_go_to_the_library_one_by_one():
    x, weight = torch.randn(4, 3, 5, 5), torch.randn(2, 4, 3, 1, 1)
    for way in ("grouped", "matmul"):
        with pytest.raises(ValueError, match="unequal"):
            conv.conv(x, weight, offsets=torch.tensor([0, 1, 4]), way=way)
    with pytest.raises(ValueError, match="one member"):
        conv.conv(x, weight[:1], way="grouped")


def test_a_key_tells_calls_apart():
    x, weight = torch.randn(4, 3, 5, 5), torch.randn(2, 4, 3, 3, 3)
    settings = ((1, 1), (1, 1), (1, 1), False, (0, 0), 1)
    last = x.contiguous(memory_format=torch.channels_last)
    calls = [
        (x, weight, None, *settings), (x.half(), weight.half(), None, *settings), (last, weight, None, *settings),
        (x[:2], weight, None, *settings), (x, weight, torch.zeros(2, 4), *settings),
        (x, weight, None, (2, 2), *settings[1:]), (x, weight[:, :2], None, *settings),
        (last, weight.movedim(2, -1).contiguous().movedim(-1, 2), None, *settings),
    ]  # fmt: skip
    keys = [conv.CHOICE.key(*call) for call in calls]
    assert len(set(keys)) == len(keys)
    assert keys[0] == conv.CHOICE.key(torch.zeros(4, 3, 5, 5), weight + 1, None, *settings)


def test_the_environment_forces_a_whole_network(monkeypatch):
    torch.manual_seed(0)
    members = [nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)) for _ in range(2)]
    ens = fastens.Ensemble(members, backend="reference").eval()
    x = torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        expected = ens(x)
        assert [(layer.layer, layer.backend) for layer in ens.report().layers] == [("Conv2d", "members")] * 2
        monkeypatch.setenv("FASTENS_CHOOSE", "conv=grouped")
        assert relative_error(ens(x), expected) <= OP[torch.float32]
        assert [layer.backend for layer in ens.report().layers] == ["grouped"] * 2


@torch.no_grad()
def test_what_is_met_first_while_a_graph_is_recorded_follows_the_rule(tmp_path, monkeypatch):
    add = choice(tmp_path / "choices.json")
    add.rule = lambda x: "fast"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert add.choose((X,), CPU) == "fast"
    assert add.choose((X,), CPU, ruled=False) == "slow"
    with torch.enable_grad():
        assert add.choose((X,), CPU) == "slow"
    assert add.clock.timed == []
    add.rule = lambda x: None
    assert add.choose((X,), CPU) == "slow"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    add.rule = lambda x: "slow"
    assert add.choose((X,), CPU) == "fast"  # measured, now that it can be


@torch.no_grad()
def test_long_measuring_is_announced_once(tmp_path, monkeypatch):
    now = iter(range(1000))
    monkeypatch.setattr(_choice.time, "monotonic", lambda: next(now))  # every measurement takes 3 seconds
    monkeypatch.setattr(_choice, "_spent", {})
    monkeypatch.setattr(_choice, "_noticed", set())
    add = choice(tmp_path / "choices.json")
    for n in (1, 2):
        add.choose((X[:n],), CPU)
    with pytest.warns(UserWarning, match=r"measuring which kernels .* kept in .*choices.json.*fastens tune"):
        add.choose((X[:3],), CPU)
    add.choose((X[:4],), CPU)


@torch.no_grad()
def test_what_is_known_is_told_without_measuring(tmp_path, monkeypatch):
    add = choice(tmp_path / "choices.json")
    assert add.known((X,), CPU) is None
    assert not add.clock.timed
    add.choose((X,), CPU)
    assert add.known((X,), CPU) == "fast"
    assert choice(tmp_path / "choices.json").known((X,), CPU) == "fast"  # from the file
    monkeypatch.setenv("FASTENS_CHOOSE", "add=slow")
    assert add.known((X,), CPU) == "slow"
    monkeypatch.delenv("FASTENS_CHOOSE")
    assert add.known((X,), torch.device("meta")) == "slow"  # nothing is measured there: the default


@torch.no_grad()
def test_a_lack_of_memory_is_not_kept_for_others(tmp_path):
    path = tmp_path / "choices.json"

    def large(x):
        raise torch.OutOfMemoryError("CUDA out of memory")

    add = choice(path, {"slow": 2e-3}, slow=Way(slow), large=Way(large))
    assert add.choose((X,), CPU) == "slow"
    assert add.choose((X,), CPU) == "slow"
    assert len(add.clock.timed) == 0  # one way was left, and the choice is known in this process
    assert not path.exists()
