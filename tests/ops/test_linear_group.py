"""Linear layers that read the same vectors, in one launch: each against the layer by itself."""

import itertools

import pytest
import torch

from fastens.ops import all_ops
from fastens.ops.linear import linear
from fastens.ops.linear_group import linear_group
from tests.ops.cases import BACKENDS, DTYPES, KERNELS
from tests.tolerances import OP, relative_error

OP_OF = all_ops()["linear_group"]
KERNELS = KERNELS[1:]  # it has no compiled kernel
BACKENDS = (BACKENDS[0], *KERNELS)


def arguments(num_members, batch, inputs, sizes, dtype=torch.float32, shape=(), biased=None):
    x = torch.randn(num_members * batch, *shape, inputs, dtype=torch.double).to(dtype)
    weights = [torch.randn(num_members, size, inputs, dtype=torch.double).to(dtype) for size in sizes]
    has_bias = itertools.cycle((True, False, True)) if biased is None else itertools.repeat(biased)
    biases = [torch.randn(num_members, size, dtype=torch.double).to(dtype) if b else None
              for size, b in zip(sizes, has_bias)]  # fmt: skip  # noqa: B905
    return x, weights, biases


def each(x, weights, biases, activation="none"):
    """Every layer by itself, in double."""
    return [
        linear(x.double(), w.double(), None if b is None else b.double(), None, activation, backend="reference")
        for w, b in zip(weights, biases, strict=True)
    ]


def agree(actual, expected, dtype, of_products=None):
    assert len(actual) == len(expected)
    for y, wanted in zip(actual, expected, strict=True):
        assert y.dtype == dtype
        assert relative_error(y, wanted) <= OP[of_products or dtype]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_each_layer(dtype, backend):
    torch.manual_seed(0)
    for num_members, batch, inputs, sizes, shape in (
        (1, 1, 40, (7, 33, 1), ()),
        (2, 3, 130, (16, 5), ()),
        (3, 2, 64, (48, 48, 20), (2,)),
        (5, 1, 9, (3,), ()),
        (8, 2, 33, (2, 70), ()),
        (17, 1, 16, (4, 8), ()),
        (2, 20, 70, (40, 9), ()),  # tensor cores
        (3, 5, 16, (5, 0, 6), ()),
    ):
        given = arguments(num_members, batch, inputs, sizes, dtype, shape)
        garbage = [torch.full((len(given[0]), size), torch.nan, dtype=dtype) for size in sizes]
        del garbage
        for activation in ("none", "silu") if num_members == 2 else ("gelu_tanh",):
            agree(linear_group(*given, activation, backend=backend), each(*given, activation), dtype)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("num_layers", [43, 64, 65, pytest.param(130, marks=pytest.mark.full)])
def test_many_layers(num_layers, backend, monkeypatch):
    from fastens.kernels import linear_group as kernels

    torch.manual_seed(0)
    sizes = [1 + i % 5 for i in range(num_layers)]
    given = arguments(2, 1, 8, sizes)
    launched = []
    kernel = kernels.linear_group_kernel

    class Counted:
        def __getitem__(self, grid):
            launched.append(grid)
            return kernel[grid]

    monkeypatch.setattr(kernels, "linear_group_kernel", Counted())
    agree(linear_group(*given, backend=backend), each(*given), torch.float32)
    assert len(launched) == -(-num_layers // 64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", [1, 6])
def test_writes_into_what_is_given(batch, backend):
    torch.manual_seed(0)
    x, weights, biases = arguments(3, batch, 24, (8, 24, 5))
    wide = torch.full((3 * batch, 64), torch.nan)  # one buffer, each result a strided view of it
    into = [wide[:, 1:9], wide[:, 10:34], wide[:, 40:45]]
    strided = torch.stack([x, torch.full_like(x, torch.nan)], 1)[:, 0]  # vectors further apart
    assert not strided.is_contiguous()
    for given in (x, strided, x.t().contiguous().t()):
        wide.fill_(torch.nan)
        ys = linear_group(given, weights, biases, backend=backend, into=into)
        assert all(y is out for y, out in zip(ys, into, strict=True))
        agree(ys, each(x, weights, biases), torch.float32)
        assert wide.isnan().sum() == 3 * batch * (64 - 37)  # and nothing beside them
    apart = torch.full((9, batch, 16), torch.nan)[::3].flatten(0, 1)[:, ::2]
    (y,) = linear_group(x, weights[:1], biases[:1], backend=backend, into=[apart])
    agree([y], each(x, weights[:1], biases[:1]), torch.float32)
    empty = [out[:0] for out in into]
    assert [y.shape[0] for y in linear_group(x[:0], weights, biases, backend=backend, into=empty)] == [0] * 3


@pytest.mark.parametrize("batch", [1, 6])
@pytest.mark.parametrize("backend", KERNELS)
def test_reads_parts_of_stacks_and_vectors_of_another_dtype(backend, batch, monkeypatch):
    """As queries, keys and values are parts of one layer, and an embedding stays in float32 before 16-bit layers."""
    torch.manual_seed(0)
    x, (weight,), (bias,) = arguments(3, batch, 24, (30,), torch.float16, biased=True)
    weights, biases = list(weight.split(10, 1)), list(bias.split(10, 1))
    expected = each(x, weights, biases)
    into = [torch.full((3 * batch, 10), torch.nan) for _ in weights]
    copies = []
    contiguous = torch.Tensor.contiguous
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda x, **k: copies.append(x) or contiguous(x, **k))
    agree(linear_group(x.float(), weights, biases, backend=backend, into=into), expected, torch.float32, torch.float16)
    assert not copies
    backwards = [w.transpose(1, 2).contiguous().transpose(1, 2) for w in weights]  # these are copied
    agree(linear_group(x, backwards, biases, backend=backend), expected, torch.float16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_addresses_may_be_used_again(backend):
    """What a call before read and wrote may be gone, and others be where it was."""
    torch.manual_seed(0)
    for _ in range(6):
        given = arguments(2, 1, 16, (8, 8))
        agree(linear_group(*given, backend=backend), each(*given), torch.float32)
        del given


@pytest.mark.parametrize("backend", KERNELS)
def test_opcheck_gradients_nan_and_empty(backend):
    torch.manual_seed(0)
    kernel = getattr(torch.ops.fastens, OP_OF.kernels[backend]).default
    x, weights, (first, _) = arguments(2, 1, 3, (2, 4), torch.float64)
    tensors = [x, *weights, first]
    for op in (kernel, OP_OF.default):
        given = (x, weights, [first], [0], "gelu")
        assert set(torch.library.opcheck(op, given).values()) == {"SUCCESS"}
        leaves = [t.clone().requires_grad_() for t in tensors]
        assert torch.autograd.gradcheck(lambda x, a, b, c, op=op: tuple(op(x, [a, b], [c], [0], "silu")), leaves)
    wrong = x.clone()
    wrong[1, 2] = torch.nan
    for y in linear_group(wrong, weights, [first, None], backend=backend):
        assert torch.equal(y.isnan().any(1), torch.tensor([False, True]))
    empty = linear_group(x[:0], weights, [first, None], backend=backend)
    assert [tuple(y.shape) for y in empty] == [(0, 2), (0, 4)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_whole_and_maps(backend):
    torch.manual_seed(0)
    x, weights, biases = arguments(2, 1, 3, (2, 4))
    torch.compiler.reset()
    run = torch.compile(lambda x: linear_group(x, weights, biases, backend=backend)[1] + 1, fullgraph=True,
                        backend="aot_eager")  # fmt: skip
    assert relative_error(run(x), each(x, weights, biases)[1] + 1) <= OP[torch.float32]
    mapped = torch.func.vmap(lambda x: tuple(linear_group(x, weights, biases, backend=backend)))
    stacked = mapped(torch.stack([x, 2 * x]))
    for y, wanted in zip(stacked, each(2 * x, weights, biases), strict=True):
        assert relative_error(y[1], wanted) <= OP[torch.float32]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, b: (x, [], []), "0 weights and 0 biases"),
        (lambda x, w, b: (x, w, b[:1]), "2 weights and 1 biases"),
        (lambda x, w, b: (x[:5], w, b), "x has 5 rows"),
        (lambda x, w, b: (x, [w[0], w[1][:, :, :2]], b), r"weights\[1\] is \[2, 4, 2\], expected \[2, out, 3\]"),
        (lambda x, w, b: (x, w, [b[0], b[0]]), r"biases\[1\] is \[2, 2\], expected \[2, 4\]"),
        (lambda x, w, b: (x, w, b, "relu"), "activation 'relu' is unknown"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        linear_group(*change(*arguments(2, 3, 3, (2, 4), biased=True)))


def test_bad_memory_is_named():
    x, weights, biases = arguments(2, 3, 3, (2, 4))
    with pytest.raises(ValueError, match=r"into\[1\] is \[6, 3\], expected \[6, 4\]"):
        linear_group(x, weights, biases, into=[torch.empty(6, 2), torch.empty(6, 3)])
