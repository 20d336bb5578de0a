"""Whole ensembles go through ``torch.compile`` in one graph and through ``torch.export``, whatever the network."""

import pytest
import torch

import fastens
from tests.networks import NETWORKS, randomised, tensor_of
from tests.tolerances import NETWORK, relative_error


def ensemble_of(name):
    make, arguments = NETWORKS[name]
    members = [randomised(make, seed) for seed in range(2)]
    return fastens.Ensemble(members, engine="fold"), members, *arguments(2)


def compiled(module, args, kwargs):
    torch._dynamo.reset()
    return torch.compile(module, fullgraph=True, backend="aot_eager")


def exported(module, args, kwargs):
    return torch.export.export(module, args, kwargs).module()


def check(run, ensemble, members, args, kwargs):
    expected = torch.stack([tensor_of(member(*args, **kwargs)) for member in members]).mean(0)
    assert relative_error(tensor_of(run(*args, **kwargs)), expected) < NETWORK[torch.float32]
    assert ensemble.engine == "fold"


@pytest.mark.parametrize("name", NETWORKS)
def test_compiles_whole(name):
    ensemble, members, args, kwargs = ensemble_of(name)
    with torch.no_grad():
        ensemble(*args, **kwargs)
        check(compiled(ensemble, args, kwargs), ensemble, members, args, kwargs)


@pytest.mark.parametrize("name", NETWORKS)
def test_exports_whole(name):
    ensemble, members, args, kwargs = ensemble_of(name)
    with torch.no_grad():
        ensemble(*args, **kwargs)
        check(exported(ensemble, args, kwargs), ensemble, members, args, kwargs)


@pytest.mark.parametrize("trace", [compiled, exported])
@pytest.mark.parametrize(
    "name", ["mlp", "transformer", "transformer_time_first", "gru_time_first", "edm_like", "vision_blocks"]
)
def test_traces_before_the_first_call(name, trace):
    ensemble, members, args, kwargs = ensemble_of(name)
    with torch.no_grad():
        check(trace(ensemble, args, kwargs), ensemble, members, args, kwargs)
