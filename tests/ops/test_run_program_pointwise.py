"""Elementwise steps: the kernels against the reference and against torch."""

import math

import pytest
import torch

from fastens import _native
from fastens.ops.run_program import available, run_program
from fastens.program import steps
from fastens.program.steps import Opcode, Strided
from fastens.reference import pointwise as pointwise_reference
from fastens.reference import run_program as reference
from tests.ops.programs import Memory, assert_close, random
from tests.tolerances import relative_error

pytestmark = pytest.mark.skipif(not available(), reason=f"no compiled library: {_native.status()}")
UNARY = {Opcode.COPY: lambda x: x, **pointwise_reference.UNARY}
BINARY, NUMBERED = pointwise_reference.BINARY, pointwise_reference.NUMBERED
EXTREME = torch.tensor(
    [
        *(
            0.0,
            -0.0,
            1e-30,
            -1e-30,
            1e-4,
            0.249999,
            0.25,
            0.250001,
            1,
            -1,
            10,
            -10,
            87.3,
            -87.3,
            88.72,
            -88.72,
            89,
            -89,
        ),
        *(100, -100, 103.9, -103.9, 200, -200, 1e4, -1e4, 1e19, -1e19, 3e38, -3e38, math.inf, -math.inf, math.nan),
    ]
)


def pointwise(sizes, out, inputs, code, tasks=1):
    """A step from its operands and (opcode, a, b, number) instructions; sizes and strides are padded in front."""
    missing = steps.MAX_DIMS - len(sizes)

    def padded(x):
        return Strided(x.at, x.dtype, [0] * missing + list(x.strides))

    words = []
    for opcode, a, b, number in code + [(Opcode.COPY, 0, 0, 0.0)] * (steps.MAX_INSTRUCTIONS - len(code)):
        words += [int(opcode) | a << 16 | b << 32, float(number)]
    rest = [Strided() for _ in range(steps.MAX_INPUTS - len(inputs))]
    all_inputs = [padded(x) for x in inputs] + rest
    sizes = [1] * missing + list(sizes)
    return steps.Pointwise(sizes, padded(out), len(inputs), all_inputs, len(code), words, tasks=tasks)


def chain(code, *inputs, tasks=1, num_threads=1):
    """Run instructions on contiguous float32 inputs of one shape."""
    memory = Memory()
    operands = [Strided(memory.put(x), 0, list(x.stride())) for x in inputs]
    view = memory.room(*inputs[0].shape)
    step = pointwise(inputs[0].shape, Strided(view.at, 0, list(view.stride)), operands, code, tasks)
    return memory.check(step, view, num_threads=num_threads)[0]


@pytest.mark.parametrize("n", [1, 15, 16, 17, 255, 256, 257, 1000])
@pytest.mark.parametrize("opcode", UNARY, ids=lambda opcode: opcode.name)
def test_unary(opcode, n):
    x = random(3, n)
    if opcode in (Opcode.LOG, Opcode.SQRT):
        x = x.abs() + 1e-3
    assert_close(chain([(opcode, 0, 0, 0.0)], x, tasks=2), UNARY[opcode](x.double()))


@pytest.mark.parametrize("n", [1, 17, 300])
@pytest.mark.parametrize("opcode", BINARY, ids=lambda opcode: opcode.name)
def test_binary(opcode, n):
    a, b = random(2, n), random(2, n, seed=1) + 3
    assert_close(chain([(opcode, 0, 1, 0.0)], a, b), BINARY[opcode](a.double(), b.double()))
    assert_close(chain([(opcode, 1, 0, 0.0)], a + 4, b), BINARY[opcode](b.double(), (a + 4).double()))


@pytest.mark.parametrize("number", [2.5, -1.0, 1e-3])
@pytest.mark.parametrize("opcode", NUMBERED, ids=lambda opcode: opcode.name)
def test_numbers(opcode, number):
    x = random(2, 37).abs() + 0.5
    assert_close(chain([(opcode, 0, 0, number)], x), NUMBERED[opcode](x.double(), number))


@pytest.mark.parametrize("opcode", UNARY, ids=lambda opcode: opcode.name)
def test_extreme_values_one_by_one(opcode):
    actual = chain([(opcode, 0, 0, 0.0)], EXTREME.clone())
    for x, y in zip(EXTREME, actual, strict=True):
        expected = UNARY[opcode](x)  # what under- or overflows, as torch has it in float32
        if expected.isfinite() and abs(expected) < 1e-37:
            assert abs(y) <= 2e-38
        else:
            assert_close(y[None], expected[None])


@pytest.mark.parametrize("opcode", UNARY, ids=lambda opcode: opcode.name)
def test_zero_keeps_its_sign_where_it_does_in_torch(opcode):
    """Behind it may be a division."""
    zeros = torch.tensor([0.0, -0.0])
    expected = UNARY[opcode](zeros)
    assert_equal_with_signs(chain([(opcode, 0, 0, 0.0)], zeros), expected)


def assert_equal_with_signs(actual, expected):
    assert torch.equal(actual, expected)
    assert torch.equal(actual.signbit(), expected.signbit())


def check_instruction(opcode):
    """One instruction, for files that run every one elsewhere: on other targets, and on other machines."""
    if opcode in UNARY:
        test_unary(opcode, 257)
        test_extreme_values_one_by_one(opcode)
    elif opcode in BINARY:
        test_binary(opcode, 17)
    else:
        test_numbers(opcode, 2.5)


def test_nan_and_infinities_in_arithmetic():
    a = torch.tensor([math.nan, math.inf, -math.inf, 0.0, 1.0]).repeat_interleave(5)
    b = torch.tensor([math.nan, math.inf, -math.inf, 0.0, 1.0]).repeat(5)
    for opcode, function in BINARY.items():
        assert_close(chain([(opcode, 0, 1, 0.0)], a, b), function(a, b))


@pytest.mark.parametrize("opcode", [*BINARY, *NUMBERED, Opcode.SQRT, Opcode.SQUARE], ids=lambda opcode: opcode.name)
def test_arithmetic_is_that_of_ieee(opcode):
    """To the bit: sums, products, quotients and roots of float32 are rounded once, of vectors and of what is left."""
    bits = torch.randint(-(2**31), 2**31, (3, 1007), generator=torch.Generator().manual_seed(0))
    a, b = bits[:2].int().view(torch.float32)  # of every magnitude, the smallest and NaN included
    for x, y in ((a, b), (a.abs().sqrt(), b.abs().sqrt()), (torch.arange(1007.0), torch.arange(1007.0).flip(0))):
        for number in (1000.0, 999.0, 10.0, 7.0, 3.0, 0.1, -1e-3, 3e-39, 1e38, 0.0, math.inf):
            actual = chain([(opcode, 0, 1, number)], x, y)
            if opcode in (Opcode.SQRT, Opcode.SQUARE):
                expected = UNARY[opcode](x.double()).float()  # which is torch's own of one by one
            else:
                expected = BINARY[opcode](x, y) if opcode in BINARY else NUMBERED[opcode](x, number)
            torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("opcode", [Opcode.EXP, Opcode.LOG, Opcode.SIN, Opcode.COS], ids=lambda opcode: opcode.name)
def test_what_embeds_a_time_is_within_two_units_of_torch(opcode):
    ranges = {Opcode.EXP: (-87.3, 88.7), Opcode.LOG: (2e-3, 80)}
    x = torch.cat([spread(*ranges.get(opcode, (-1e4, 1e4))), torch.arange(1.0, 88), torch.linspace(1e-3, 1, 1000)])
    actual, torchs = chain([(opcode, 0, 0, 0.0)], x), UNARY[opcode](x)
    away = (actual.view(torch.int32).long() - torchs.view(torch.int32).long()).abs()
    assert away.max() <= 2


def spread(low, high, n=200_003):
    return torch.linspace(low, high, n, dtype=torch.float64).float()


def relative(actual, expected):
    return ((actual.double() - expected).abs() / expected.abs().clamp_min(1e-300)).max().item()


def test_tanh_keeps_its_relative_error():
    x = torch.cat([spread(-10, 10), spread(-0.3, 0.3), torch.logspace(-30, -1, 1000)])
    x = x[x != 0]
    assert relative(chain([(Opcode.TANH, 0, 0, 0.0)], x), x.double().tanh()) <= 1e-6


def test_exponential_is_within_two_units_in_the_last_place():
    x = torch.cat([spread(-87.3, 88.72), spread(-1, 1)])
    exact = x.double().exp()
    unit = torch.exp2(exact.log2().floor() - 23)
    actual = chain([(Opcode.EXP, 0, 0, 0.0)], x)
    assert ((actual.double() - exact).abs() / unit).max() <= 2


@pytest.mark.parametrize("opcode", [Opcode.SILU, Opcode.SIGMOID, Opcode.GELU, Opcode.GELU_TANH], ids=lambda o: o.name)
def test_activations_over_their_range(opcode):
    x = spread(-20, 20)
    assert relative_error(chain([(opcode, 0, 0, 0.0)], x), UNARY[opcode](x.double())) <= 1e-6
    if opcode in (Opcode.SILU, Opcode.SIGMOID):
        assert relative(chain([(opcode, 0, 0, 0.0)], x[x != 0]), UNARY[opcode](x[x != 0].double())) <= 1e-6


@pytest.mark.parametrize(("tasks", "num_threads"), [(1, 1), (3, 2), (24, 5)])
def test_longest_chain_of_all_inputs(tasks, num_threads):
    inputs = [random(24, 300, seed=i) for i in range(4)]
    code = [
        (Opcode.MULTIPLY, 0, 1, 0.0),  # register 4
        (Opcode.ADD, 4, 2, 0.0),
        (Opcode.TANH, 5, 0, 0.0),
        (Opcode.ADD_NUMBER, 6, 0, 2.0),
        (Opcode.DIVIDE, 3, 7, 0.0),
        (Opcode.SQUARE, 8, 0, 0.0),
        (Opcode.SUBTRACT, 9, 4, 0.0),
        (Opcode.MULTIPLY_NUMBER, 10, 0, -0.5),  # register 11
    ]
    a, b, c, d = (x.double() for x in inputs)
    expected = -0.5 * ((d / ((a * b + c).tanh() + 2)).square() - a * b)
    assert_close(chain(code, *inputs, tasks=tasks, num_threads=num_threads), expected)


@pytest.mark.parametrize("tasks", [1, 2, 7, 144])
def test_six_dimensions_broadcast_into_a_slice(tasks):
    sizes = (2, 3, 2, 4, 3, 19)
    memory = Memory()
    a, b = random(3, 2, 4, 3, 19), random(2, 3, 1, 1, 1, 19)
    left = Strided(memory.put(a), 0, [0, *a.stride()])
    right = Strided(memory.put(b), 0, [3 * 19, 19, 0, 0, 0, 1])
    view = memory.room(*sizes, stride=(4000, 1300, 640, 150, 40, 2))
    step = pointwise(sizes, Strided(view.at, 0, list(view.stride)), [left, right], [(Opcode.ADD, 0, 1, 0.0)], tasks)
    (actual,) = memory.check(step, view, num_threads=2)
    assert torch.equal(actual, a + b)


def call(step, inputs, outputs):
    """Run a step between tensors of the call; return the kernel's and the reference's outputs."""
    results = []
    for run in (run_program, reference.run_program):
        own = [x.clone() for x in outputs]
        run(steps.encode([step]), torch.empty(0), torch.full((16,), torch.nan), inputs, own, 2)
        results.append(own)
    return results


@pytest.mark.parametrize("target", steps.DTYPES, ids=str)
@pytest.mark.parametrize("source", steps.DTYPES, ids=str)
@pytest.mark.parametrize("stride", [1, 3])
def test_dtypes(source, target, stride):
    """A change of dtype goes through float32; integers are truncated, bfloat16 is rounded to nearest even."""
    n = 300
    values = torch.linspace(-1000.7, 1000.3, n * stride, dtype=torch.float64)
    x, out = values.to(source)[::stride], torch.zeros(n * stride, dtype=target)[::stride]
    step = pointwise(
        [n],
        Strided(steps.address(3, 0), steps.DTYPES[target], [stride]),
        [Strided(steps.address(2, 0), steps.DTYPES[source], [stride])],
        [(Opcode.COPY, 0, 0, 0.0)],
    )
    (actual,), (expected,) = call(step, [x], [torch.zeros(n * stride, dtype=target)])
    assert torch.equal(actual, expected)
    direct = x if source == target else x.float().to(target)
    assert torch.equal(actual[::stride], direct)
    assert out.shape == direct.shape


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.int32], ids=str)
def test_copies_are_exact(dtype):
    x = torch.tensor([2**31 - 1, 2**24 + 1, -(2**24) - 3], dtype=dtype)
    if dtype != torch.int32:
        x = x * 2**20 + 1
    codes = steps.DTYPES[dtype]
    step = pointwise(
        [3],
        Strided(steps.address(3, 0), codes, [1]),
        [Strided(steps.address(2, 0), codes, [1])],
        [(Opcode.COPY, 0, 0, 0.0)],
    )
    (actual,), (expected,) = call(step, [x], [torch.zeros_like(x)])
    assert torch.equal(actual, x)
    assert torch.equal(expected, x)


def test_bfloat16_keeps_nan_and_infinities():
    x = torch.tensor([math.nan, math.inf, -math.inf, 3.39e38, 1.0])
    to = Strided(steps.address(3, 0), steps.DTYPES[torch.bfloat16], [1])
    step = pointwise([5], to, [Strided(steps.address(2, 0), 0, [1])], [(Opcode.COPY, 0, 0, 0.0)])
    (actual,), (expected,) = call(step, [x], [torch.zeros(5, dtype=torch.bfloat16)])
    assert_close(actual, x.bfloat16())
    assert_close(expected, x.bfloat16())


def test_programs_are_decoded_as_they_were_written():
    code = [(Opcode.ADD, 0, 1, 0.0), (Opcode.MULTIPLY_NUMBER, 2, 0, -0.3)]
    operands = [Strided(steps.address(2, 4), 1, [3]), Strided(steps.NONE, 2, [1])]
    written = [
        pointwise([5], Strided(8, 0, [1]), operands, code, tasks=3),
        steps.Attention(1, 2, 3, 4, 5, 6, 7, *(steps.Heads(8 * i, i, 2, 3, 4) for i in range(4)), 0.5, tasks=9),
    ]
    assert steps.decode(steps.encode(written)) == written


def test_unknown_kinds_are_refused():
    program = torch.zeros(1, steps.STEP_WIDTH, dtype=torch.int64)
    for run in (run_program, reference.run_program):
        with pytest.raises((RuntimeError, ValueError), match="of no known kind"):
            run(program, torch.empty(0), torch.empty(16), [], [], 1)
