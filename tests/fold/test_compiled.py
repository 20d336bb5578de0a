"""Whole ensembles go through ``torch.compile`` in one graph and through ``torch.export``, whatever the network."""

import inspect

import pytest
import torch
import torch.utils._pytree as pytree

import fastens
from tests.networks import NETWORKS, randomised, tensor_of
from tests.tolerances import NETWORK, relative_error


def in_turn(first):
    """Every other network; the others are for ``make test-full``."""
    return [pytest.param(name, marks=pytest.mark.full if (i + first) % 2 else ()) for i, name in enumerate(NETWORKS)]


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


@pytest.mark.parametrize("name", in_turn(0))
def test_compiles_whole(name):
    ensemble, members, args, kwargs = ensemble_of(name)
    with torch.no_grad():
        ensemble(*args, **kwargs)
        check(compiled(ensemble, args, kwargs), ensemble, members, args, kwargs)


@pytest.mark.parametrize("name", in_turn(1))
def test_exports_whole(name):
    ensemble, members, args, kwargs = ensemble_of(name)
    with torch.no_grad():
        ensemble(*args, **kwargs)
        check(exported(ensemble, args, kwargs), ensemble, members, args, kwargs)


@pytest.mark.parametrize("name", ["mlp", "transformer", "gru", "magnitude_preserving", "vision_blocks"])
def test_exports_with_a_named_batch(name):
    make, arguments = NETWORKS[name]
    ensemble = fastens.Ensemble([randomised(make, seed) for seed in range(2)], engine="fold")
    args, kwargs = arguments(4)
    batch = torch.export.Dim("batch", min=2, max=64)
    given = inspect.signature(make().forward).bind(*args, **kwargs).arguments
    sizes = pytree.tree_map(lambda x: {0: batch} if isinstance(x, torch.Tensor) and x.ndim else None, given)
    with torch.no_grad():
        program = torch.export.export(ensemble, args, kwargs, dynamic_shapes=sizes).module()
        for count in (4, 2, 7):
            args, kwargs = arguments(count)
            assert (
                relative_error(tensor_of(program(*args, **kwargs)), tensor_of(ensemble(*args, **kwargs)))
                < NETWORK[torch.float32]
            )


@pytest.mark.parametrize("trace", [compiled, exported])
@pytest.mark.parametrize(
    "name", ["mlp", "transformer", "transformer_time_first", "gru_time_first", "edm_like", "vision_blocks"]
)
def test_traces_before_the_first_call(name, trace):
    ensemble, members, args, kwargs = ensemble_of(name)
    with torch.no_grad():
        check(trace(ensemble, args, kwargs), ensemble, members, args, kwargs)
