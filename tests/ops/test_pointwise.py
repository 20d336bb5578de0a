"""A chain of elementwise instructions in one kernel, against the reference in float64."""

import pytest
import torch

from fastens.ops import all_ops
from fastens.ops.pointwise import pointwise
from fastens.program.steps import Opcode
from fastens.reference.pointwise import BINARY, NUMBERED, UNARY, unrounded
from tests.ops.cases import BACKENDS, DTYPES, KERNELS
from tests.tolerances import OP, relative_error

OP_OF = all_ops()["pointwise"]
KERNELS = KERNELS[1:]  # it has no compiled kernel
BACKENDS = (BACKENDS[0], *KERNELS)
POSITIVE = {Opcode.LOG, Opcode.SQRT, Opcode.DIVIDE, Opcode.NUMBER_OVER}
CHAIN = [  # (x * y + z) * silu(x), minus from 2
    (Opcode.MULTIPLY, 0, 1, 0.0),
    (Opcode.ADD, 3, 2, 0.0),
    (Opcode.SILU, 0, 0, 0.0),
    (Opcode.MULTIPLY, 4, 5, 0.0),
    (Opcode.NUMBER_MINUS, 6, 0, 2.0),
]


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=torch.double).to(dtype)


def in_double(inputs, code):
    return unrounded([x.double() for x in inputs], *zip(*code, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("opcode", Opcode, ids=lambda opcode: opcode.name)
def test_every_instruction(opcode, backend):
    torch.manual_seed(0)
    assert opcode in {Opcode.COPY, *UNARY, *BINARY, *NUMBERED}
    for dtype in DTYPES:
        x, y = (3 * normal(37, dtype=dtype) for _ in "xy")
        if opcode in POSITIVE:
            x, y = x.abs() + 0.5, y.abs() + 0.5
        code = [(opcode, 0, 1, 1.7)]
        for given in ((x, y), (1e-3 * x, y)) if opcode not in POSITIVE else ((x, y),):
            actual = pointwise(given, code, backend=backend)
            assert actual.dtype == dtype
            assert relative_error(actual, in_double(given, code)) <= OP[dtype]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("opcode", [*UNARY, *BINARY, *NUMBERED], ids=lambda opcode: opcode.name)
def test_numbers_at_the_edge(opcode, backend):
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 90.0, -90.0, 1e30, -1e30])
    y = torch.tensor([1.0, 2.0, torch.nan, torch.inf, 3.0, -1.0, 0.5, 2.0, 2.0])
    code = [(opcode, 0, 1, -2.5)]
    if opcode in (Opcode.SIN, Opcode.COS):
        x = x[:7]
        y = y[:7]
    expected = in_double([x, y], code).float()
    actual = pointwise((x, y), code, backend=backend)
    torch.testing.assert_close(actual, expected, equal_nan=True, rtol=OP[torch.float32], atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chains_round_once(dtype, backend):
    torch.manual_seed(0)
    for shapes in (
        [(5,), (5,), (5,)],
        [(2, 3, 7, 5), (2, 3, 1, 1), (7, 5)],
        [(3, 1300), (3, 1), (1300,)],
        [(1, 1), (1, 4), (3, 1)],
        [(), (), ()],
        [(17, 2, 3), (1,), (17, 1, 1)],
        [(0, 3), (3,), (1, 1)],
    ):
        inputs = [normal(*shape, dtype=dtype) for shape in shapes]
        expected = in_double(inputs, CHAIN)
        garbage = torch.full_like(expected, torch.nan, dtype=dtype)
        del garbage
        actual = pointwise(inputs, CHAIN, backend=backend)
        assert relative_error(actual, expected) <= OP[dtype], shapes
    x = torch.tensor([1.0], dtype=dtype)
    tiny = [(Opcode.ADD_NUMBER, 0, 0, 1e-4), (Opcode.ADD_NUMBER, 1, 0, -1.0), (Opcode.MULTIPLY_NUMBER, 2, 0, 1e4)]
    assert relative_error(pointwise([x], tiny, backend=backend), torch.ones(1)) <= max(OP[dtype], 2e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_arithmetic_is_that_of_ieee(backend):
    """To the bit, of numbers of every magnitude."""
    bits = torch.randint(-(2**31), 2**31, (2, 2000), generator=torch.Generator().manual_seed(0))
    x, y = bits.int().view(torch.float32)
    for opcode in (*BINARY, *NUMBERED):
        actual = pointwise((x, y), [(opcode, 0, 1, 1000.0)], backend=backend)
        expected = BINARY[opcode](x, y) if opcode in BINARY else NUMBERED[opcode](x, 1000.0)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    if backend != "reference":  # torch's own roots are off by a unit
        roots = pointwise((x.abs(),), [(Opcode.SQRT, 0, 0, 0.0)], backend=backend)
        torch.testing.assert_close(roots, x.abs().double().sqrt().float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_exponents_keep_their_digits(backend):
    x = torch.linspace(-87, 88.7, 10001)
    exact = x.double().exp()
    actual = pointwise((x,), [(Opcode.EXP, 0, 0, 0.0)], backend=backend)
    assert ((actual.double() - exact).abs() / exact).max() <= 2.4e-7  # two units in the last place
    edge = torch.tensor([-1e30, -104.0, -103.0, -88.0, 88.7228, 88.73, 100.0, 1e30, torch.nan, torch.inf, -torch.inf])
    actual = pointwise((edge,), [(Opcode.EXP, 0, 0, 0.0)], backend=backend)
    torch.testing.assert_close(actual, edge.exp(), rtol=3e-7, atol=3e-45, equal_nan=True)


def layouts(x):
    """The same numbers [R, C, H, W] in other places."""
    yield x
    yield x.movedim(1, -1).contiguous().movedim(-1, 1)
    yield x.flip(0).contiguous().flip(0).transpose(2, 3).contiguous().transpose(2, 3)
    wide = torch.full((x.shape[0], x.shape[1] + 3, *x.shape[2:]), torch.nan, dtype=x.dtype)
    wide[:, 2:-1] = x
    yield wide[:, 2:-1]
    yield torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_and_memory_of_another_dtype(dtype, backend):
    torch.manual_seed(0)
    x, y, z = normal(3, 5, 4, 6, dtype=dtype), normal(3, 5, 1, 1, dtype=dtype), normal(1, 1, 4, 6, dtype=dtype)
    expected = in_double([x, y, z], CHAIN)
    for given in layouts(x):
        for memory in layouts(torch.empty(3, 5, 4, 6)):
            memory.fill_(torch.nan)
            assert pointwise([given, y, z], CHAIN, backend=backend, into=memory) is memory
            assert relative_error(memory, expected) <= OP[torch.float32]  # not rounded to bfloat16 between
    beside = torch.full((3, 8, 4, 6), torch.nan)
    pointwise([x, y, z], CHAIN, backend=backend, into=beside[:, 1:6])
    assert beside.isnan().sum() == 3 * 3 * 4 * 6


@pytest.mark.parametrize("backend", KERNELS)
def test_indices_of_64_bits(backend, monkeypatch):
    from fastens.kernels import pointwise as kernels

    monkeypatch.setattr(kernels, "SHORT", 5)
    torch.manual_seed(0)
    inputs = [normal(3, 5, 4, 6), normal(3, 5, 1, 1), normal(1, 1, 4, 6)]
    assert relative_error(pointwise(inputs, CHAIN, backend=backend), in_double(inputs, CHAIN)) <= OP[torch.float32]


@pytest.mark.parametrize("backend", BACKENDS)
def test_copies_keep_what_they_copy(backend):
    big = torch.tensor([2**53 + 1, -7, 2**24 + 1])
    copy = [(Opcode.COPY, 0, 0, 0.0)]
    for source, target in ((big, torch.int64), (big, torch.float64), (big, torch.float32), (big > 0, torch.float32),
                           (normal(5), torch.float16)):  # fmt: skip
        out = torch.empty(source.shape, dtype=target)
        pointwise([source], copy, backend=backend, into=out)
        assert torch.equal(out, source.to(target))
    x = normal(2, 3, 2, 5)
    out = torch.empty(2, 3, 4, 10)  # every pixel four times
    enlarged = out.unflatten(3, (5, 2)).unflatten(2, (2, 2))
    pointwise([x[:, :, :, None, :, None].expand_as(enlarged)], copy, backend=backend, into=enlarged)
    assert torch.equal(out, x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    mixed = pointwise([big, normal(3)], [(Opcode.MULTIPLY, 0, 1, 0.0)], backend=backend)
    assert mixed.dtype == torch.float32


@pytest.mark.parametrize("backend", KERNELS)
def test_opcheck_and_gradients(backend):
    torch.manual_seed(0)
    kernel = getattr(torch.ops.fastens, OP_OF.kernels[backend]).default
    inputs = [normal(2, 3, dtype=torch.double), normal(3, dtype=torch.double), normal(2, 1, dtype=torch.double)]
    arguments = [list(column) for column in zip(*[(int(o), a, b, n) for o, a, b, n in CHAIN], strict=True)]
    for op in (kernel, OP_OF.default):
        assert set(torch.library.opcheck(op, (inputs, *arguments)).values()) == {"SUCCESS"}
        leaves = [x.clone().requires_grad_() for x in inputs]
        assert torch.autograd.gradcheck(lambda *x, op=op: op(list(x), *arguments), leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_whole(backend):
    torch.manual_seed(0)
    inputs = [normal(2, 3), normal(3), normal(2, 1)]
    torch.compiler.reset()
    run = torch.compile(lambda *x: pointwise(x, CHAIN, backend=backend) + 1, fullgraph=True, backend="aot_eager")
    assert relative_error(run(*inputs), in_double(inputs, CHAIN) + 1) <= OP[torch.float32]


def test_bad_input_is_named():
    x = torch.zeros(3)
    with pytest.raises(ValueError, match="0 inputs and 5 instructions"):
        pointwise([], CHAIN)
    with pytest.raises(ValueError, match="instruction 0 reads registers 0 and 1, and 1 are written"):
        pointwise([x], [(Opcode.ADD, 0, 1, 0.0)])
    with pytest.raises(ValueError, match=r"into is \[2\], expected \[3\]"):
        pointwise([x], [(Opcode.ABS, 0, 0, 0.0)], into=torch.zeros(2))
