"""A pass recorded without its arithmetic is the pass: the same operations on tensors of the same shapes."""

import pytest
import torch

import fastens
from fastens.engine.arguments import Arguments
from fastens.engine.calls import PlannedCall
from fastens.trace.record import record
from fastens.trace.sketch import sketched
from tests.networks import NETWORKS, randomised


def recordings(name):
    make, arguments = NETWORKS[name]
    ensemble = fastens.Ensemble([randomised(make, seed) for seed in range(2)], engine="fold", backend="reference")
    args, kwargs = arguments(3)
    with torch.no_grad():
        call = Arguments(args, kwargs)
        whole, _, _ = PlannedCall(ensemble._engine, call).passes()
        return [record(lambda: whole(call.tensors), call.tensors, sketch)[0] for sketch in (None, sketched)]


def layout(ref):
    strides = [stride for n, stride in zip(ref.size, ref.stride, strict=True) if n > 1]
    return ref.size, strides, ref.dtype


def shapes(recording):
    return [(node.name, [layout(ref) for ref in node.outs]) for node in recording.operations]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_sketch_records_what_the_pass_does(name):
    computed, sketch = recordings(name)
    assert computed.operations
    assert shapes(sketch) == shapes(computed)


def test_a_sketch_does_not_compute():
    _, sketch = recordings("unet_2d")
    outs = [ref for node in sketch.operations if node.name == "fastens.conv" for ref in node.outs]
    assert outs
    assert all(not sketch.tensors[ref.storage].any() for ref in outs)
