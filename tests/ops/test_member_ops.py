"""Every member-batched op against K separate torch layers, with equal and with ragged groups."""

import pytest
import torch
import torch.nn.functional as F

import fastens.fold  # noqa: F401 - registers the ops
from fastens.ops.batch_norm import batch_norm
from fastens.ops.conv import conv
from fastens.ops.embedding import embedding
from fastens.ops.group_norm import group_norm
from fastens.ops.layer_norm import layer_norm
from fastens.ops.linear import linear
from fastens.ops.rms_norm import rms_norm
from tests.tolerances import OP, relative_error

SPACE = {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 1)}


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype)


# op -> (arguments for K members and R rows, the op, one member by torch)
OPS = {
    "linear": (
        lambda k, r, d: (normal(r, 3, 5, dtype=d), normal(k, 4, 5, dtype=d), normal(k, 4, dtype=d)),
        lambda x, w, b, o: linear(x, w, b, o),
        lambda x, w, b: F.linear(x, w, b),
    ),
    "conv": (
        lambda k, r, d: (normal(r, 4, 6, 5, dtype=d), normal(k, 6, 2, 3, 2, dtype=d), normal(k, 6, dtype=d)),
        lambda x, w, b, o: conv(x, w, b, **SPACE, groups=2, offsets=o),
        lambda x, w, b: F.conv2d(x, w, b, **SPACE, groups=2),
    ),
    "conv_transposed": (
        lambda k, r, d: (normal(r, 4, 7, dtype=d), normal(k, 4, 3, 3, dtype=d), normal(k, 3, dtype=d)),
        lambda x, w, b, o: conv(x, w, b, (2,), (1,), (1,), True, (1,), offsets=o),
        lambda x, w, b: F.conv_transpose1d(x, w, b, 2, 1, 1),
    ),
    "group_norm": (
        lambda k, r, d: (normal(r, 6, 5, dtype=d), normal(k, 6, dtype=d), normal(k, 6, dtype=d)),
        lambda x, w, b, o: group_norm(x, 3, w, b, 1e-3, o),
        lambda x, w, b: F.group_norm(x, 3, w, b, 1e-3),
    ),
    "layer_norm": (
        lambda k, r, d: (normal(r, 2, 3, 5, dtype=d), normal(k, 3, 5, dtype=d), normal(k, 3, 5, dtype=d)),
        lambda x, w, b, o: layer_norm(x, (3, 5), w, b, 1e-3, o),
        lambda x, w, b: F.layer_norm(x, (3, 5), w, b, 1e-3),
    ),
    "rms_norm": (
        lambda k, r, d: (normal(r, 2, 5, dtype=d), normal(k, 5, dtype=d)),
        lambda x, w, o: rms_norm(x, (5,), w, 1e-3, o),
        lambda x, w: F.rms_norm(x, (5,), w, 1e-3),
    ),
    "batch_norm": (
        lambda k, r, d: (
            normal(r, 4, 5, dtype=d),
            normal(k, 4, dtype=d),
            normal(k, 4, dtype=d).abs() + 0.5,
            normal(k, 4, dtype=d),
            normal(k, 4, dtype=d),
        ),
        lambda x, m, v, w, b, o: batch_norm(x, m, v, w, b, 1e-3, o),
        lambda x, m, v, w, b: F.batch_norm(x, m, v, w, b, False, 0.0, 1e-3),
    ),
    "embedding": (
        lambda k, r, d: (torch.randint(7, (r, 3)), normal(k, 7, 4, dtype=d)),
        lambda x, w, o: embedding(x, w, o),
        lambda x, w: F.embedding(x, w),
    ),
}


def groups(num_members, ragged, batch):
    if not ragged:
        return None, [batch] * num_members
    sizes = [(3 * k + batch) % 4 for k in range(num_members)]  # some of them empty
    return torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()]), sizes


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("num_members", [1, 2, 3, 5, 8, 17])
@pytest.mark.parametrize("name", OPS)
def test_equals_separate_layers(name, num_members, ragged):
    torch.manual_seed(num_members)
    make, op, one = OPS[name]
    for dtype in (torch.float32, torch.float64):
        for batch in (1, 3):
            offsets, sizes = groups(num_members, ragged, batch)
            x, *stacks = make(num_members, sum(sizes), dtype)
            expected = torch.cat([one(r, *(s[k] for s in stacks)) for k, r in enumerate(x.split(sizes)) if len(r)])
            assert relative_error(op(x, *stacks, offsets), expected) < OP[dtype]


@pytest.mark.parametrize("name", OPS)
def test_layouts_and_empty_batch(name):
    make, op, _ = OPS[name]
    x, *stacks = make(3, 6, torch.float32)
    expected = op(x, *stacks, None)
    strided = x.transpose(0, -1).contiguous().transpose(0, -1)
    assert relative_error(op(strided, *stacks, None), expected) < OP[torch.float32]
    assert op(x[:0], *stacks, None).shape == (0, *expected.shape[1:])


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("name", OPS)
def test_gradients(name, ragged):
    torch.manual_seed(0)
    make, op, _ = OPS[name]
    offsets, sizes = groups(3, ragged, 2)
    x, *stacks = make(3, sum(sizes), torch.float64)
    inputs = [t.requires_grad_() if t.is_floating_point() else t for t in (x, *stacks)]
    assert torch.autograd.gradcheck(lambda *tensors: op(*tensors, offsets), inputs)


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name):
    make, _, _ = OPS[name]
    x, *stacks = make(2, 4, torch.float32)
    operator = getattr(torch.ops.fastens, name.removesuffix("_transposed")).default
    arguments = {
        "linear": lambda: (x, *stacks),
        "conv": lambda: (x, *stacks, [2, 1], [1, 0], [1, 1], False, [0, 0], 2),
        "conv_transposed": lambda: (x, *stacks, [2], [1], [1], True, [1], 1),
        "group_norm": lambda: (x, 3, *stacks),
        "layer_norm": lambda: (x, [3, 5], *stacks),
        "rms_norm": lambda: (x, [5], *stacks),
        "batch_norm": lambda: (x, *stacks),
        "embedding": lambda: (x, *stacks),
    }[name]()
    results = torch.library.opcheck(operator, arguments)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linear(normal(5, 3), normal(2, 4, 3)), "x has 5 rows"),
        (lambda: linear(normal(4, 2), normal(2, 4, 3)), "weight expects 3"),
        (lambda: linear(normal(4, 3), normal(4, 3)), "expected \\[members, out, in\\]"),
        (lambda: linear(normal(4, 3), normal(2, 4, 3), normal(2, 3)), "bias is \\[2, 3\\], expected \\[2, 4\\]"),
        (lambda: linear(normal(4, 3), normal(2, 4, 3), None, torch.tensor([0, 4])), "expected int64 \\[3\\]"),
        (lambda: conv(normal(4, 3, 5, 5), normal(2, 3, 3, 3)), "a member axis more"),
        (lambda: conv(normal(4, 2, 5, 5), normal(2, 4, 3, 3, 3)), "2 channels, weight expects 3"),
        (lambda: group_norm(normal(4, 6), 3, normal(2, 5)), "weight is \\[2, 5\\], expected \\[2, 6\\]"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_embedding_never_reads_another_members_table():
    with pytest.raises(IndexError):
        embedding(torch.tensor([[0], [7]]), normal(2, 7, 4))
