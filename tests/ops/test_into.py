"""Kernels that write where they are told, and read where it lies: strided memory, and nothing beside it is touched."""

import pytest
import torch
import torch.nn.functional as F

from fastens.ops import group_norm as group_norm_op
from fastens.ops import layer_norm as layer_norm_op
from fastens.ops import linear as linear_op
from tests.ops.cases import DTYPES, needs_triton
from tests.tolerances import OP, relative_error

pytestmark = needs_triton


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=torch.double).to(dtype)


def within(x, before=2, after=3, dim=-1):
    """The same numbers within a wider tensor of NaN: the wide one and the view."""
    size = list(x.shape)
    size[dim] += before + after
    wide = torch.full(size, torch.nan, dtype=x.dtype)
    view = wide.narrow(dim, before, x.shape[dim])
    view.copy_(x)
    return wide, view


def images(x):
    """Layouts of images [R, C, H, W] in which places are equally far apart: the memory and the view."""
    last = x.movedim(1, -1).contiguous()
    yield x.clone(), None
    yield last, last.movedim(-1, 1)
    for dim, of in ((-1, last), (1, x)):
        wide, view = within(of, dim=dim)
        yield wide, view.movedim(-1, 1) if dim == -1 else view


def untouched(memory, numel):
    return int((~memory.isnan()).sum()) == numel


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear(dtype):
    from fastens.kernels.linear import linear

    torch.manual_seed(0)
    for members, batch, shape, inputs, outputs in ((1, 1, (), 17, 5), (3, 2, (3,), 20, 33), (2, 5, (2, 2), 9, 16)):
        x, weight = normal(members * batch, *shape, inputs, dtype=dtype), normal(members, outputs, inputs, dtype=dtype)
        bias = normal(members, outputs, dtype=dtype)
        expected = linear_op.linear(x.double(), weight.double(), bias.double(), None, "silu", backend="reference")
        wide, into = within(torch.full_like(expected, torch.nan, dtype=dtype))
        y = linear(within(x)[1], weight, bias, None, "silu", into=into)
        assert y is into
        assert relative_error(into, expected) <= OP[dtype]
        assert untouched(wide, into.numel())
    given = torch.randn(4, 8).half().float()  # rounded as it is read
    stack, bias = normal(2, 12, 8, dtype=dtype), normal(2, 12, dtype=dtype)
    parts = stack[:, 3:9], bias[:, 3:9]
    expected = linear_op.linear(given.to(dtype).double(), *(t.double() for t in parts), backend="reference")
    y = linear(given, *parts)
    assert y.dtype == dtype
    assert relative_error(y, expected) <= OP[dtype]
    with pytest.raises(ValueError, match="expected contiguous vectors equally far apart"):
        linear(x, weight, bias, into=torch.empty(*x.shape[:-1], 2 * outputs)[..., ::2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm(dtype):
    from fastens.kernels.layer_norm import layer_norm

    torch.manual_seed(0)
    for rows, shape, last in ((3, (5,), 1), (6, (4, 19), 1), (3, (2, 3, 6), 2), (3, (8200,), 1)):
        x = 3 * normal(rows, *shape, dtype=dtype) + 1
        weight, bias = (normal(3, *shape[-last:], dtype=dtype) for _ in "wb")
        arguments = (shape[-last:], weight.double(), bias.double(), 1e-3)
        expected = layer_norm_op.layer_norm(x.double(), *arguments, backend="reference")
        dim = -last
        wide, into = within(torch.full_like(expected, torch.nan, dtype=dtype), dim=dim)
        assert layer_norm(within(x, dim=dim)[1], shape[-last:], weight, bias, 1e-3, into=into) is into
        assert relative_error(into, expected) <= OP[dtype]
        assert untouched(wide, into.numel())
    tokens = normal(2, 7, 3, 4)  # rows whose tokens are not equally far apart from row to row
    strided = tokens.transpose(0, 1).contiguous().transpose(0, 1)[:, :, :, :]
    expected = F.layer_norm(strided, (4,))
    assert relative_error(layer_norm(strided, [4]), expected) <= OP[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_group_norm_and_moments(dtype):
    from fastens.kernels.group_moments import group_moments
    from fastens.kernels.group_norm import group_norm
    from fastens.reference.group_moments import group_moments as reference

    torch.manual_seed(0)
    for size, groups in (((4, 16, 3, 5), 4), ((2, 6, 13, 11), 2)):
        x = 3 * normal(*size, dtype=dtype) + 1
        weight, bias = (normal(2, size[1], dtype=dtype) for _ in "wb")
        expected = group_norm_op.group_norm(x.double(), groups, weight.double(), bias.double(), 1e-3,
                                            activation="silu", backend="reference")  # fmt: skip
        moments = reference(x.double(), groups)
        for source, place in zip(images(x), images(torch.full_like(x, torch.nan)), strict=True):
            given, into = (memory if view is None else view for memory, view in (source, place))
            y = group_norm(given, groups, weight, bias, 1e-3, None, None, None, "silu", into=into)
            assert y is into
            assert relative_error(into, expected) <= OP[dtype]
            assert untouched(place[0], into.numel())
            assert (
                relative_error(group_moments(given, groups), moments) <= OP[torch.promote_types(dtype, torch.float32)]
            )


@pytest.mark.parametrize("up", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_join(dtype, up):
    from fastens.kernels._join import join

    torch.manual_seed(0)
    for rows, channels, height, width in (
        (2, (5, 8), 3, 4),
        (17, (3,), 1, 1),
        (1, (130, 1, 7), 2, 5),
        (0, (2, 3), 2, 2),
        (3, (4, 0), 3, 3),
    ):
        given = [normal(rows, c, height, width, dtype=dtype) for c in channels]
        expected = torch.cat(given, 1).repeat_interleave(up, 2).repeat_interleave(up, 3)
        for memory, view in images(torch.full_like(expected, torch.nan)):
            into = memory if view is None else view
            layouts = [list(images(image)) for image in given]
            mixed = [of[i % 4][0] if of[i % 4][1] is None else of[i % 4][1] for i, of in enumerate(layouts)]
            assert join(mixed, up, into) is into
            assert torch.equal(into, expected)
            assert untouched(memory, into.numel())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_attention(dtype):
    from fastens.kernels._attention import attention, takes

    torch.manual_seed(0)
    for rows, heads, queries, keys, width, value_width in (
        (1, 1, 1, 1, 1, 1),
        (2, 3, 5, 7, 8, 8),
        (3, 1, 70, 70, 40, 24),
        (5, 2, 16, 130, 16, 33),
        (140, 1, 40, 3, 4, 4),
        (1, 1, 20, 65, 256, 200),
        (0, 2, 4, 4, 8, 8),
    ):
        q, k = (2 * normal(rows, tokens, heads, width, dtype=dtype).movedim(2, 1) for tokens in (queries, keys))
        v = normal(rows, keys, heads, value_width, dtype=dtype).movedim(2, 1)
        scale = width**-0.5
        expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=scale)
        wide, into = within(torch.full((rows, queries, heads, value_width), torch.nan, dtype=dtype))
        into = into.movedim(2, 1)
        assert takes(q, v, into)
        given = [within(x)[1] for x in (q, k, v)]
        assert attention(*given, scale, into) is into
        assert relative_error(into, expected) <= OP[dtype]
        assert untouched(wide, into.numel())
    assert not takes(q, v, into.float())
    with pytest.raises(ValueError, match="attention"):
        attention(
            normal(1, 1, 2, 300), normal(1, 1, 2, 300), normal(1, 1, 2, 300), 1.0, torch.empty(1, 1, 2, 300).half()
        )


def test_attention_of_large_scores_and_nan():
    from fastens.kernels._attention import attention

    torch.manual_seed(0)
    q, k, v = (normal(2, 1, 70, 16, dtype=torch.float16) for _ in "qkv")
    q = 30 * q
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=2.0)
    out = torch.empty_like(q)
    assert relative_error(attention(q, k, v, 2.0, out), expected) <= OP[torch.float16]
    q[0, 0, 3, 2] = torch.nan
    attention(q, k, v, 2.0, out)
    assert torch.equal(out.isnan().any(-1), torch.isnan(q).any(-1))
    k[1, 0, 69, 0] = torch.nan
    attention(q, k, v, 2.0, out)
    assert out[1].isnan().all()
