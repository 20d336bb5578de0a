"""Networks of the atlas give what the plain loop over members gives, and fold unless their entries say why."""

import inspect
import re

import pytest
import torch
import torch._dynamo.testing
from torch import nn

import fastens
from fastens import _native
from tests.atlas.__main__ import PAGE
from tests.atlas.compare import compare, looped, members_of, tensors
from tests.atlas.registry import Draws, arguments, dynamic, load
from tests.atlas.sample import sample

NETWORKS = load()
GRADIENTS = 1e-3  # of a parameter against its own largest, in float32 through some hundred layers


def built(name):
    """How a network is made and called; skips where its package is missing."""
    try:
        return NETWORKS[name].build()
    except ImportError as error:
        pytest.skip(f"{error}; pip install --no-deps -r tests/interop/requirements.txt")


def test_holds_forty_networks():
    assert len(NETWORKS) >= 40


def check_network(name):
    built(name)
    entry = NETWORKS[name]
    found = compare(entry)
    assert max(found.errors) < 1e-5
    assert max(found.gradient_errors) < GRADIENTS
    looping = found.engine == "loop"
    assert looping == bool(entry.looped), found.why or "it folds: its entry says otherwise"
    assert looping == bool(found.warned), found.warned
    if looping:
        assert entry.looped in found.why
    assert not found.slices, "functions without a rule"
    if not looping and _native.load():
        assert bool(found.plans) != bool(entry.unplanned), (
            found.why_no_plan or "it is planned: its entry says otherwise"
        )
        assert entry.unplanned in found.why_no_plan


@pytest.mark.parametrize("name", sample())
@pytest.mark.filterwarnings("ignore")
def test_equals_the_loop(name):
    check_network(name)


def test_every_network_went_through_the_long_form():
    """``make atlas`` compares all networks and writes the page; the sample stands for those that it has seen."""
    assert set(re.findall(r"^\| `(\w+)` ", PAGE.read_text(), re.MULTILINE)) == set(NETWORKS)


def test_inputs_follow_the_seed():
    _, given = built("dit")
    (_, first), (_, second), (_, again) = (arguments(given, 2, seed) for seed in (0, 1, 0))
    assert torch.equal(first["hidden_states"], again["hidden_states"])
    assert not torch.equal(first["hidden_states"], second["hidden_states"])
    assert Draws(0).unit(100).min() > 0


class Reading(nn.Module):
    """A network that must be looped, since its Python reads a value that differs between members."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return x * self.weight if self.weight.sum() > 100 else x + self.weight


def test_a_comparison_sees_a_loop_and_a_wrong_value(monkeypatch):
    entry = type(NETWORKS["dit"])("reading", "", lambda: (Reading, lambda b, r: (r(b, 3),)))
    found = compare(entry)
    assert found.engine == "loop"
    assert found.warned
    ours = fastens.Ensemble.forward
    monkeypatch.setattr(fastens.Ensemble, "forward", lambda self, *a, **k: ours(self, *a, **k) * 1.001)
    assert max(compare(entry).errors) > 1e-4


def seldom(*names):
    """Networks for ``make test-full``: what they hold the others do, in less time."""
    return [pytest.param(name, marks=pytest.mark.full) for name in names]


EXPORTED = ["adm", "diffusion_policy", "pixart", *seldom("sit", "csdi", "stable_diffusion_3", "unet_2d")]
COMPILED = ["sit", *seldom("csdi")]


def check_batches(ensemble, members, run, given):
    for batch in (3, 5):
        args, kwargs = arguments(given, batch, batch)
        for a, b in zip(tensors(run(*args, **kwargs)), looped(members, (args, kwargs)), strict=True):
            assert (a - b).abs().max() < 1e-5 * b.abs().max()
    assert ensemble.engine == "fold"


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.filterwarnings("ignore")
def test_compiled_as_often_as_a_member(name):
    make, given = built(name)
    members = members_of(make, 2)
    ensemble = fastens.Ensemble(members, engine="fold")
    counts = []
    for module, parts in ((members[0], members[:1]), (ensemble, members)):
        torch._dynamo.reset()
        graphs = torch._dynamo.testing.CompileCounter()
        with torch.no_grad():
            run = torch.compile(module, fullgraph=True, dynamic=True, backend=graphs)
            check_batches(ensemble, parts, run, given)
        counts.append(graphs.frame_count)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", EXPORTED)
@pytest.mark.filterwarnings("ignore")
def test_exported_for_all_batches(name):
    make, given = built(name)
    members = members_of(make, 2)
    ensemble = fastens.Ensemble(members, engine="fold")
    args, kwargs = arguments(given, 3, 0)
    names = list(inspect.signature(ensemble.forward).parameters)
    with torch.no_grad():
        shapes = dynamic(names, (args, kwargs), 3, torch.export.Dim.DYNAMIC)
        run = torch.export.export(ensemble, args, kwargs, dynamic_shapes=shapes).module()
        check_batches(ensemble, members, run, given)
