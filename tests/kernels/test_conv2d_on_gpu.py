"""Convolutions on a GPU against the reference on the CPU; what compute-sanitizer runs."""

import pytest
import torch

from fastens.ops.group_moments import group_moments
from tests.ops.cases import DTYPES
from tests.ops.convolutions import VARIANTS, block, conv2d, conv2d_sum, in_double
from tests.tolerances import OP, relative_error

_conv2d_launch = pytest.importorskip("fastens.kernels._conv2d_launch")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_convolutions(name, dtype, split, monkeypatch):
    if not split:
        monkeypatch.setattr(_conv2d_launch, "MOST_SPLITS", 1)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    arguments, options = VARIANTS[name][0](dtype)
    expected, _ = conv2d(*in_double(arguments), **in_double(options), backend="reference")
    arguments, options = on_gpu(arguments), on_gpu(options)
    actual, moments = conv2d(*arguments, **options, backend="triton")
    assert relative_error(actual.cpu(), expected) <= OP[dtype]
    if moments is not None:
        stored = group_moments(actual.cpu(), options["num_groups"], backend="reference")
        assert relative_error(moments.cpu(), stored) <= 1e-5
    for _ in range(20):  # no result depends on which tile was first
        again, _ = conv2d(*arguments, **options, backend="triton")
        assert torch.equal(again, actual)


def test_splits_of_graphs_and_launches_at_the_same_time_meet_each_their_own():
    torch.manual_seed(0)
    x, weight = torch.randn(2, 256, 8, 8, device="cuda"), torch.randn(2, 128, 256, 3, 3, device="cuda")
    expected, _ = conv2d(x, weight, None, (1, 1), (1, 1), backend="triton")
    assert _conv2d_launch.tiles_for(x, 2, 1, 64, 128, (256,), 9, 0).splits > 1
    graphs, results, streams = [], [], [torch.cuda.Stream() for _ in range(3)]
    for _ in streams[1:]:
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            results.append([conv2d(x, weight, None, (1, 1), (1, 1), backend="triton")[0] for _ in range(8)])
    torch.cuda.synchronize()
    for _ in range(50):
        with torch.cuda.stream(streams[0]):
            eager, _ = conv2d(x, weight, None, (1, 1), (1, 1), backend="triton")
        for stream, graph in zip(streams[1:], graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(y, expected) for y in (eager, *results[0], *results[1]))


@pytest.mark.parametrize("size", [8, 32, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_block_of_a_networks_size(dtype, size):
    torch.manual_seed(0)
    arguments, options = block(5, 10, 128, 256, (size, size), dtype=dtype, groups=(32, 32))
    expected, _ = conv2d(*in_double(arguments), **in_double(options), backend="reference")
    actual, moments = conv2d(*on_gpu(arguments), **on_gpu(options), backend="triton")
    assert relative_error(actual.cpu(), expected) <= OP[dtype]
    assert relative_error(moments.cpu(), group_moments(actual.cpu(), 32, backend="reference")) <= 1e-5
    ending = (actual, torch.randn(5, 3, 256, 3, 3).to(actual) / 48, None, [0.2] * 5, (1, 1), (1, 1))
    summed = conv2d_sum(*ending, moments=moments, activation="silu", backend="triton")
    given = [t.cpu() if isinstance(t, torch.Tensor) else t for t in ending]
    reference = conv2d_sum(*in_double(given), moments=moments.cpu().double(), activation="silu", backend="reference")
    assert relative_error(summed.cpu(), reference) <= OP[dtype]


def on_gpu(value):
    if isinstance(value, dict):
        return {name: on_gpu(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [on_gpu(item) for item in value]
    return value.cuda() if isinstance(value, torch.Tensor) else value
