"""The native convolution for passes without a plan: against the reference in float64, and when it is taken."""

import itertools

import pytest
import torch

from fastens.ops import all_ops
from fastens.ops._conv_ways import MOST_PRODUCTS
from fastens.ops.conv import CHOICE, conv
from tests.ops.cases import needs_native
from tests.tolerances import OP, relative_error

pytestmark = needs_native
OPS = all_ops()
SHAPES = [  # channels, outputs, space, kernel, stride, padding
    (1, 3, (5,), (3,), (1,), (1,)),
    (6, 17, (9,), (2,), (3,), (0,)),
    (3, 1, (7, 5), (3, 3), (1, 1), (1, 1)),
    (5, 48, (6, 9), (3, 2), (2, 1), (0, 1)),
    (33, 20, (4, 4), (1, 1), (1, 1), (0, 0)),
    (17, 70, (1, 1), (1, 1), (1, 1), (0, 0)),
    (4, 6, (40, 33), (5, 5), (1, 2), (2, 4)),
]


def case(shape, num_members, rows, last=False):
    channels, outputs, space, kernel, stride, padding = shape
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, channels, *space, generator=generator)
    if last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    weight = torch.randn(num_members, outputs, channels, *kernel, generator=generator)
    bias = torch.randn(num_members, outputs, generator=generator)
    ones = (1,) * len(space)
    return x, weight, bias, stride, padding, ones, False, (0,) * len(space), 1


def expected_of(arguments):
    x, weight, bias, *rest = arguments
    return conv(x.double(), weight.double(), None if bias is None else bias.double(), *rest, way="members")


@pytest.mark.parametrize("num_members", [1, 2, 5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(shape, num_members):
    for batch, last in itertools.product((1, 3), (False, True)):
        arguments = case(shape, num_members, num_members * batch, last)
        garbage = [torch.full_like(expected_of(arguments), torch.nan, dtype=torch.float32) for _ in range(3)]
        del garbage
        actual, library = conv(*arguments, way="native"), conv(*arguments, way="members")
        assert relative_error(actual, expected_of(arguments)) <= OP[torch.float32]
        assert library.ndim == 3 or actual.stride() == library.stride() or actual[0, 0].numel() == 1
        unbiased = (*arguments[:2], None, *arguments[3:])
        assert relative_error(conv(*unbiased, way="native"), expected_of(unbiased)) <= OP[torch.float32]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ragged_rows_and_strided_arguments(shape):
    offsets = torch.tensor([0, 2, 2, 5])
    arguments = (*case(shape, 3, 5), offsets)
    strided = [torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0] for t in arguments[:3]]
    expected = expected_of(arguments)
    assert relative_error(conv(*arguments, way="native"), expected) <= OP[torch.float32]
    assert relative_error(conv(*strided, *arguments[3:], way="native"), expected) <= OP[torch.float32]
    wrong = (*arguments[:-1], torch.tensor([0, 4, 2, 5]))
    with pytest.raises(RuntimeError, match="does not rise"):
        conv(*wrong, way="native")


def test_shared_rows_empty_batch_and_nan():
    arguments = case(SHAPES[3], 3, 1)
    shared = (arguments[0].expand(3, *arguments[0].shape[1:]), *arguments[1:])
    assert relative_error(conv(*shared, way="native"), expected_of(shared)) <= OP[torch.float32]
    empty = (arguments[0][:0], *arguments[1:])
    assert conv(*empty, way="native").shape == (0, *expected_of(shared).shape[1:])
    no_channels = (shared[0][:, :0], arguments[1][:, :, :0], *arguments[2:])
    assert torch.equal(conv(*no_channels), expected_of(no_channels).float())  # the bias
    poisoned = case(SHAPES[2], 2, 4)
    poisoned[0][1, 0, 3, 2] = torch.nan
    assert torch.equal(conv(*poisoned, way="native").isnan(), expected_of(poisoned).isnan())


def test_opcheck_gradients_and_compile():
    kernel = getattr(torch.ops.fastens, OPS["conv"].kernels["native"]).default
    for shape, last in itertools.product((SHAPES[1], SHAPES[3]), (False, True)):
        arguments = case(shape, 2, 4, last)
        leaves = [t.clone().requires_grad_() for t in arguments[:3]]
        assert set(torch.library.opcheck(kernel, (*leaves, *arguments[3:])).values()) == {"SUCCESS"}
        gradients = torch.autograd.grad(conv(*leaves, *arguments[3:], way="native").square().sum(), leaves)
        same = torch.autograd.grad(conv(*leaves, *arguments[3:], way="members").square().sum(), leaves)
        for a, b in zip(gradients, same, strict=True):
            assert relative_error(a, b) <= OP[torch.float32]
    torch.compiler.reset()
    run = torch.compile(lambda *a: conv(*a, way="native") + 1, fullgraph=True, backend="aot_eager")
    assert relative_error(run(*arguments), expected_of(arguments) + 1) <= OP[torch.float32]


def test_when_it_is_taken():
    def way(arguments):
        return CHOICE.choose(arguments, arguments[0].device)

    small = case(SHAPES[3], 3, 6)
    with torch.no_grad():
        assert way(small) == "native"
        assert way((small[0].double(), small[1].double(), *small[2:])) == "members"
        assert way((*small[:5], (2, 2), *small[6:])) == "members"
        assert way((*small[:8], 2)) == "members"
        side = 32
        channels = int((MOST_PRODUCTS[False] / side**2) ** 0.5) + 1
        large = case((channels, channels, (side, side), (1, 1), (1, 1), (0, 0)), 1, 1)
        assert way(large) == "members"
        assert way((large[0].contiguous(memory_format=torch.channels_last), *large[1:])) == "native"
    assert way(small) == "members"  # a derivative may be wanted
    for changed, why in (({5: (2, 2)}, "dilated"), ({8: 2}, "grouped")):
        arguments = [changed.get(i, argument) for i, argument in enumerate(small)]
        if 8 in changed:
            arguments[1] = arguments[1].repeat(1, 1, 1, 1, 1)[:, :, :2]
            arguments[0] = arguments[0][:, :4]
        with pytest.raises(ValueError, match=why):
            conv(*arguments, way="native")
