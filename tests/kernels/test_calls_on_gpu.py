"""What the launches of a plan call, on a GPU, against the reference on the CPU."""

import pytest
import torch
import torch.nn.functional as F

from fastens.ops.group_moments import group_moments
from fastens.ops.group_norm import group_norm
from fastens.ops.linear_group import linear_group
from fastens.ops.pointwise import pointwise
from fastens.program.block import Prologue
from fastens.program.steps import Opcode
from tests.fold.test_plan_calls import last, launches
from tests.ops.test_linear_group import arguments, each
from tests.ops.test_pointwise import CHAIN, POSITIVE, in_double, layouts, normal
from tests.tolerances import OP, relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICE = "cuda"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("name", launches())
def test_a_launch_is_one_kernel(name):
    run, out = launches(DEVICE)[name]
    expected = torch.empty_like(out)
    run(expected, "reference")
    run(out, "auto")
    assert relative_error(out, expected) <= 2 * OP[torch.float16]  # both are rounded
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run(out, "auto")
        torch.cuda.synchronize()
    kernels = [event.key for event in profile.key_averages() for _ in range(event.count) if event.device_time_total > 0]
    assert len(kernels) == 1, kernels


@pytest.mark.parametrize("batch", [1, 3, 8, 16, 256])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_layers_of_a_networks_size(dtype, batch):
    torch.manual_seed(0)
    x, weights, biases = arguments(3, batch, 512, [256, 512, 256] * 14 + [3], dtype)
    weights = [w / 20 for w in weights]
    expected = each(x, weights, biases, "silu")
    given = (x.to(DEVICE), [w.to(DEVICE) for w in weights], [None if b is None else b.to(DEVICE) for b in biases])
    for y, wanted in zip(linear_group(*given, "silu", backend="triton"), expected, strict=True):
        assert relative_error(y.cpu(), wanted) <= OP[dtype]


def test_a_recorded_graph_reads_and_writes_its_own_memory():
    torch.manual_seed(0)
    x, weights, biases = arguments(3, 1, 64, [32] * 5)
    x, weights = x.to(DEVICE), [w.to(DEVICE) for w in weights]
    biases = [None if b is None else b.to(DEVICE) for b in biases]
    linear_group(x, weights, biases, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ys = linear_group(x, weights, biases, backend="triton")
    for _ in range(3):
        x.normal_()
        garbage = [torch.full((3, 32), torch.nan, device=DEVICE) for _ in range(20)]
        del garbage
        graph.replay()
        for y, wanted in zip(ys, each(x, weights, biases), strict=True):
            assert relative_error(y, wanted) <= OP[torch.float32]


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
@pytest.mark.parametrize("opcode", Opcode, ids=lambda opcode: opcode.name)
def test_every_instruction(opcode, dtype):
    torch.manual_seed(0)
    x, y = (3 * normal(1037, dtype=dtype) for _ in "xy")
    if opcode in POSITIVE:
        x, y = x.abs() + 0.5, y.abs() + 0.5
    code = [(opcode, 0, 1, 1.7)]
    actual = pointwise([x.to(DEVICE), y.to(DEVICE)], code, backend="triton")
    assert relative_error(actual.cpu(), in_double([x, y], code)) <= OP[dtype]


@pytest.mark.parametrize("divisor", [3, 7, 10, 999, 1000, 0.1, 2**0.5])
def test_divisions_are_those_of_torch_on_this_device(divisor):
    """Of tensors to the nearest; by a number with the reciprocal that torch multiplies by, as launches take it."""
    x = torch.arange(1000.0, device=DEVICE)
    factor = (torch.ones((), device=DEVICE) / divisor).item()
    by_number = pointwise([x], [(Opcode.MULTIPLY_NUMBER, 0, 0, factor)], backend="triton")
    assert torch.equal(by_number, x / divisor)
    y = torch.full_like(x, divisor)
    assert torch.equal(pointwise([x, y], [(Opcode.DIVIDE, 0, 1, 0.0)], backend="triton"), x / y)
    fused = pointwise([x, y], [(Opcode.MULTIPLY, 0, 1, 0.0), (Opcode.ADD, 2, 0, 0.0)], backend="triton")
    assert torch.equal(fused, x * y + x)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_chains_in_any_layout(dtype):
    torch.manual_seed(0)
    x, y, z = normal(3, 48, 20, 32, dtype=dtype), normal(3, 48, 1, 1, dtype=dtype), normal(1, 1, 20, 32, dtype=dtype)
    expected = in_double([x, y, z], CHAIN)
    for given in layouts(x.to(DEVICE)):
        for memory in layouts(torch.empty(3, 48, 20, 32, dtype=dtype, device=DEVICE)):
            pointwise([given, y.to(DEVICE), z.to(DEVICE)], CHAIN, backend="triton", into=memory)
            assert relative_error(memory.cpu(), expected) <= OP[dtype]


@pytest.mark.parametrize("size", [8, 32, 128])
@pytest.mark.parametrize("channels", [(256, 0), (256, 128), (24, 12)])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_norms_by_moments(dtype, channels, size):
    from fastens.kernels.group_norm import normalise

    torch.manual_seed(0)
    images = [3 * last(5, c, size, size, dtype=dtype) + 1 for c in channels if c]
    weight, bias = (torch.randn(5, sum(channels)).to(dtype) for _ in "wb")
    per_group = 4
    moments = [group_moments(image.float(), image.shape[1] // per_group, backend="reference") for image in images]
    groups = sum(channels) // (3 * per_group) if channels[1] else sum(channels) // (2 * per_group)
    expected = group_norm(torch.cat(images, 1).double(), groups, weight.double(), bias.double(), 1e-5,
                          activation="silu", backend="reference")  # fmt: skip
    (x, *skip), (before, *after) = ([t.to(DEVICE) for t in of] for of in (images, moments))
    prologue = Prologue(
        before, weight.to(DEVICE), bias.to(DEVICE), activation="silu", norm_groups=groups,
        skip=next(iter(skip), None), skip_moments=next(iter(after), None),
    )  # fmt: skip
    actual = normalise(x, prologue)
    assert relative_error(actual.cpu(), expected) <= OP[dtype]


@pytest.mark.parametrize("shape", [(5, 1, 256, 256), (320, 1, 256, 256), (20, 8, 64, 64), (6, 4, 77, 40), (1, 1, 1, 1)])
@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
def test_attention(dtype, shape):
    from fastens.kernels._attention import attention

    torch.manual_seed(0)
    rows, heads, tokens, width = shape
    q, k, v = torch.randn(3, rows, tokens, heads, width).to(dtype).movedim(3, 2).unbind(0)
    out = torch.empty(rows, tokens, heads, width + 8, dtype=dtype, device=DEVICE).movedim(2, 1)[..., 8:]
    attention(*(x.to(DEVICE) for x in (q, k, v)), width**-0.5, out)
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert relative_error(out.cpu(), expected) <= OP[dtype]
