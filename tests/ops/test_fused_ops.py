"""Norms and the linear layer with what is fused behind them: every backend against the reference in float64."""

import pytest
import torch

from fastens.ops import all_ops
from fastens.ops.dropout import dropout
from fastens.ops.group_norm import group_norm
from fastens.ops.layer_norm import layer_norm
from fastens.ops.linear import linear
from tests.ops.cases import BACKENDS, DTYPES, KERNELS
from tests.tolerances import OP, relative_error

OPS = all_ops()
KERNELS = KERNELS[1:]  # these ops have no compiled kernel yet
BACKENDS = (BACKENDS[0], *KERNELS)


def channels_last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def calls(name, num_members, rows, dtype=torch.float32, offsets=None):
    """Arguments of one op that use everything it has, in several shapes and layouts."""

    def normal(*shape):
        return torch.randn(shape, dtype=torch.double).to(dtype)

    if name == "group_norm":
        for channels, groups, space in ((6, 3, (5,)), (16, 4, (7, 9)), (4, 1, (73, 60)), (4, 2, (2, 3, 2))):
            stacks, own = [normal(num_members, channels) for _ in "wb"], [normal(rows, channels) for _ in "sh"]
            for x in (normal(rows, channels, *space), channels_last(normal(rows, channels, *space))):
                yield (3 * x + 1, groups, *stacks, 1e-3, offsets, *own, "silu")
    elif name == "layer_norm":
        for shape, last in (((5,), 1), ((3, 7), 1), ((2, 3, 5), 2), ((8200,), 1)):
            feature = shape[-last:]
            stacks, own = [normal(num_members, *feature) for _ in "wb"], [normal(rows, *feature) for _ in "sh"]
            yield (3 * normal(rows, *shape) + 1, feature, *stacks, 1e-3, offsets, *own, "silu")
    else:
        for shape, outputs, activation in (
            ((5,), 7, "none"),
            ((3, 70), 40, "silu"),
            ((9,), 33, "gelu"),
            ((9,), 1, "gelu_tanh"),
        ):
            weight, bias = normal(num_members, outputs, shape[-1]), normal(num_members, outputs)
            yield (normal(rows, *shape), weight, bias, offsets, activation)


PUBLIC = {"group_norm": group_norm, "layer_norm": layer_norm, "linear": linear}


def in_double(arguments):
    return [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in arguments]


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PUBLIC)
def test_kernel_equals_reference(name, dtype, backend):
    torch.manual_seed(0)
    ragged = torch.tensor([0, 1, 1, 3])
    for i, (num_members, offsets) in enumerate(
        ((1, None), (2, None), (3, None), (3, ragged), (5, None), (8, None), (17, None))
    ):
        rows = 3 if num_members == 3 else num_members
        given = list(calls(name, num_members, rows, dtype, offsets))
        # the interpreter is slow: with 3 members every call (group norm: every second,
        # the others in the next dtype), with another number one call
        if num_members == 3:
            given = given[(i + DTYPES.index(dtype)) % 2 :: 2] if name == "group_norm" else given
        else:
            given = given[:1]
        for arguments in given:
            expected = PUBLIC[name](*in_double(arguments), backend="reference")
            garbage = [torch.full_like(expected, torch.nan, dtype=dtype) for _ in range(3)]
            del garbage
            actual = PUBLIC[name](*arguments, backend=backend)
            assert actual.dtype == dtype
            assert relative_error(actual, expected) <= OP[dtype], arguments[0].shape


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", PUBLIC)
def test_opcheck_nan_and_empty_batch(name, backend):
    torch.manual_seed(0)
    kernel = getattr(torch.ops.fastens, OPS[name].kernels[backend]).default
    arguments = next(calls(name, 2, 4))
    assert set(torch.library.opcheck(kernel, arguments).values()) == {"SUCCESS"}
    x = arguments[0].clone()
    x[1].view(-1)[2] = torch.nan
    with torch.no_grad():
        mapped = PUBLIC[name](x, *arguments[1:], backend=backend)
        expected = PUBLIC[name](x, *arguments[1:], backend="reference")
        assert torch.equal(mapped.isnan(), expected.isnan())
        assert mapped[1].isnan().any()
        empty = next(calls(name, 2, 0))
        assert PUBLIC[name](*empty, backend=backend).shape[0] == 0


SMALL = {  # arguments after the rows x of 2 members: few numbers, because each is perturbed
    "group_norm": ((2, 2, 3), (1, [(2, 2), (2, 2)], 1e-3, None, [(2, 2), (2, 2)], "silu")),
    "layer_norm": ((2, 2, 3), ([3], [(2, 3), (2, 3)], 1e-3, None, [(2, 3), (2, 3)], "silu")),
    "linear": ((2, 2, 3), ([(2, 4, 3), (2, 4)], None, "gelu")),
}


@pytest.mark.covering(1)
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", PUBLIC)
def test_gradients_of_every_number(name, backend, masked):
    torch.manual_seed(0)

    def parameter(*shape):
        return torch.randn(shape, dtype=torch.double, requires_grad=True)

    shape, rest = SMALL[name]
    arguments = [parameter(*shape)]
    for argument in rest:
        shapes = argument if isinstance(argument, list) and isinstance(argument[0], tuple) else None
        arguments += [argument] if shapes is None else [parameter(*each) for each in shapes]
    if masked:
        arguments += [torch.tensor([1, 0]), torch.tensor([3, 3]), 0.4, 11, 5]
    assert torch.autograd.gradcheck(getattr(torch.ops.fastens, OPS[name].kernels[backend]).default, arguments)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", PUBLIC)
def test_strided_arguments_and_equal_values(name, backend):
    torch.manual_seed(0)
    arguments = list(calls(name, 3, 3))[2]
    expected = PUBLIC[name](*in_double(arguments), backend="reference")
    strided = [
        torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0] if isinstance(t, torch.Tensor) else t
        for t in arguments
    ]
    assert not strided[0].is_contiguous()
    actual = PUBLIC[name](*strided, backend=backend)
    assert relative_error(actual, expected) <= OP[torch.float32]
    flipped = [arguments[0].flip(-1), *arguments[1:]]
    assert (
        relative_error(PUBLIC[name](*flipped, backend=backend), PUBLIC[name](*in_double(flipped), backend="reference"))
        <= OP[torch.float32]
    )
    equal = [torch.full_like(arguments[0], 1e4), *arguments[1:]]  # no variance at all, far from zero
    assert (
        relative_error(PUBLIC[name](*equal, backend=backend), PUBLIC[name](*in_double(equal), backend="reference"))
        <= OP[torch.float32]
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PUBLIC)
def test_dropout_behind_it_has_the_bits_of_the_op(name, backend):
    torch.manual_seed(0)
    members, samples = torch.tensor([4, 0, 1]), torch.tensor([2, 2, 0])
    shapes = set()
    for i, arguments in enumerate(calls(name, 3, 3)):
        plain = PUBLIC[name](*arguments, backend="reference")
        drawn = (samples, 0.6, -3, 2**33 + 5) if i % 2 else (None, 0.3, 2**40 + 1, 9)
        expected = dropout(plain, members, *drawn, backend="reference")
        actual = PUBLIC[name](*arguments, members, *drawn, backend=backend)
        assert relative_error(actual, expected) <= OP[torch.float32]
        assert torch.equal(actual == 0, expected == 0)
        shapes.add(plain[0].shape.numel() % 4 == 0)
        assert torch.equal(PUBLIC[name](*arguments, members, None, 0.0, 7, backend=backend) == 0, plain == 0)
    assert shapes == {True, False}  # words of Philox shared by four elements, and not
    with pytest.raises(ValueError, match="expected the member of each row"):
        PUBLIC[name](*arguments, p=0.5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PUBLIC)
def test_compiles_whole(name, backend):
    arguments = next(calls(name, 2, 4))
    torch.compiler.reset()
    run = torch.compile(lambda *a: PUBLIC[name](*a, backend=backend) + 1, fullgraph=True, backend="aot_eager")
    expected = PUBLIC[name](*arguments, backend="reference") + 1
    assert relative_error(run(*arguments), expected) <= OP[torch.float32]


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"scale is \[3, 6\], expected \[4, 6\] \(rows first\)"):
        group_norm(torch.zeros(4, 6, 2), 3, scale=torch.zeros(3, 6))
    with pytest.raises(ValueError, match=r"expected .* with 4 groups"):
        group_norm(torch.zeros(4, 6, 2), 4)
    with pytest.raises(ValueError, match="activation 'relu' is unknown"):
        linear(torch.zeros(4, 6), torch.zeros(2, 3, 6), activation="relu")
