"""The convolution of a residual block, and the one that ends in a sum: every variant against the reference."""

import itertools

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import nn

from fastens.device import device_of
from fastens.ops import all_ops
from fastens.ops.group_moments import group_moments
from fastens.ops.group_norm import group_norm
from fastens.program.block import ConvBlock
from tests.ops.cases import BACKENDS, DTYPES, KERNELS, interpreted
from tests.ops.convolutions import VARIANTS, block, conv2d, conv2d_sum, in_double, masked, norm, normal, straddling
from tests.tolerances import OP, relative_error

OPS = all_ops()
KERNELS = KERNELS[1:]  # these ops have no compiled kernel yet
BACKENDS = (BACKENDS[0], *KERNELS)


class Recorder:
    """A kernel that notes that it was launched."""

    def __init__(self, kernel, launched, name):
        self.kernel, self.launched, self.name = kernel, launched, name

    def __getitem__(self, grid):
        self.launched.append(self.name + (" in splits" if grid[1:] > (1,) else ""))
        return self.kernel[grid]


@pytest.fixture
def launched(monkeypatch, request):
    """The kernels that ran, by name, as on a GPU of one multiprocessor unless the test is of split sums."""
    from fastens.kernels import _conv2d_launch, conv2d, conv2d_sum, group_moments

    if "split" not in request.node.name:
        monkeypatch.setattr("fastens.device.MULTIPROCESSORS", 1)
    names = []
    for module in (_conv2d_launch, conv2d, conv2d_sum, group_moments):
        for name in ("maps_kernel", "conv2d_kernel", "conv2d_sum_kernel", "partial_kernel"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, Recorder(getattr(module, name), names, name))
    return names


@pytest.fixture
def poison():
    """New memory is NaN."""
    torch.use_deterministic_algorithms(True)  # which fills it
    yield
    torch.use_deterministic_algorithms(False)


# every variant in one dtype, and the whole block in each; on a GPU all variants run in all
IN_DTYPES = [*itertools.product(["block"], DTYPES), *zip(list(VARIANTS)[1:], itertools.cycle(DTYPES), strict=False)]


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(*case, marks=[] if case in IN_DTYPES else interpreted)
        for case in itertools.product(VARIANTS, DTYPES)
    ],
    ids=str,
)
def test_kernel_equals_reference(name, dtype, backend, launched, poison):
    torch.manual_seed(0)
    make, kernels = VARIANTS[name]
    arguments, options = make(dtype)
    expected, _ = conv2d(*in_double(arguments), **in_double(options), backend="reference")
    actual, moments = conv2d(*arguments, **options, backend=backend)
    assert launched == kernels
    assert actual.dtype == dtype
    assert relative_error(actual, expected) <= OP[dtype]
    if moments is not None:  # of the result as it is stored
        assert relative_error(moments, group_moments(actual, options["num_groups"], backend="reference")) <= 1e-5


@pytest.mark.covering(2)
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["plain", "norm", "split", "norm split"])
def test_sum_equals_reference(form, dtype, backend, launched, poison):
    torch.manual_seed(0)
    members, rows, channels = {"plain": (5, 2, 7), "norm": (3, 3, 8)}.get(form, (2, 1, 70))
    x = normal(members * rows, channels, 5, 4, dtype=dtype)
    weight = normal(members, 3, channels, 3, 3, dtype=dtype) / (3 * channels**0.5)
    options = norm(x, 2, members, dtype) if "norm" in form else {}
    arguments = (x, weight, normal(members, 3, dtype=dtype), [0.7, -0.2, 0.3, 0.1, 0.4][:members], (1, 1), (1, 1))
    expected = conv2d_sum(*in_double(arguments), **in_double(options), backend="reference")
    actual = conv2d_sum(*arguments, **options, backend=backend)
    assert launched == ["conv2d_sum_kernel" + (" in splits" if "split" in form else "")]
    assert actual.dtype == dtype
    assert relative_error(actual, expected) <= OP[dtype]


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("op", ["conv2d", "conv2d_sum", "tma 64x128", "tma 128x128"])
def test_splits_are_joined_in_order_whichever_is_last(op, backend, monkeypatch):
    from triton.runtime.interpreter import interpreter_builder

    from fastens.kernels import _conv2d_launch, _conv2d_tma

    torch.manual_seed(0)
    taken = []

    def counters(tiles, y):
        taken.append(torch.zeros(tiles, dtype=torch.int32))
        return taken[-1]

    monkeypatch.setattr(_conv2d_launch, "counters", counters)
    x, weight = normal(2, 200, 3, 5), normal(2, 20, 200, 3, 3)

    def run():
        if op.startswith("tma"):
            weights = weight.movedim(2, -1).contiguous().movedim(-1, 2)
            images = x.contiguous(memory_format=torch.channels_last)
            return _conv2d_tma.conv2d_tma(ConvBlock.of(images, weights, padding=(1, 1), num_groups=5), op)[0]
        if op == "conv2d_sum":
            return conv2d_sum(x, weight, None, [1.0, 2.0], (1, 1), (1, 1), backend=backend)
        return conv2d(x, weight, None, (1, 1), (1, 1), num_groups=5, backend=backend)[0]

    expected = run()
    place = interpreter_builder.set_grid_idx
    turned = []

    def last_first(tile, split, *rest):
        turned.append(interpreter_builder.grid_dim[1] - 1 - split)
        place(tile, turned[-1], *rest)

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", last_first)
    assert torch.equal(run(), expected)
    assert max(turned) > 2
    assert len(taken) == 2
    assert not any(t.any() for t in taken)


@pytest.mark.parametrize("per_group", [0, 1, 3, 8, 64, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_of_few_programs_hold_whole_groups_where_they_can(dtype, per_group):
    launch = pytest.importorskip("fastens.kernels._conv2d_launch")
    for rows, space, channels in ((1, 1, 3), (1, 64, 256), (2, 100, 512), (64, 16, 256)):
        tiles = launch.tiles_for(torch.empty(0, dtype=dtype), 5, rows, space, 256, (channels, 40), 9, per_group)
        programs = 5 * -(-rows // tiles.rows) * -(-space // tiles.places) * -(-256 // tiles.block_n)
        assert tiles.splits == 1 or programs * tiles.splits <= device_of("cpu").multiprocessors
        assert tiles.block_n >= (per_group if per_group in (1, 8) else 16)
        assert per_group != 64 or dtype == torch.double or tiles.block_n in (64, 128)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_residual_block_is_two_calls(backend):
    torch.manual_seed(0)
    members, rows = 2, 4
    x, time = normal(rows, 16, 6, 5), normal(rows, 24)
    first, second, skip = (normal(members, 24, c, n, n) / (n * c**0.5) for c, n in ((16, 3), (24, 3), (16, 1)))
    bias, maps = normal(members, 24), [normal(members, c) for c in (16, 16, 24, 24)]
    y = F.silu(group_norm(x, 4, *maps[:2], backend="reference"))
    y = torch.cat([F.conv2d(r, first[k], bias[k], padding=1) for k, r in enumerate(y.chunk(members))])
    y = F.silu(group_norm(y + time[:, :, None, None], 8, *maps[2:], backend="reference"))
    y = torch.cat([F.conv2d(r, second[k], bias[k], padding=1) for k, r in enumerate(y.chunk(members))])
    kept = torch.cat([F.conv2d(r, skip[k]) for k, r in enumerate(x.chunk(members))])
    ends = group_moments(x, 4, backend=backend)
    kept_too, _ = conv2d(x, skip, backend=backend)
    before = {"activation": "silu", "backend": backend}
    inner, moments = conv2d(
        x, first, bias, (1, 1), (1, 1), moments=ends, norm_weight=maps[0], norm_bias=maps[1], row_bias=time,
        num_groups=8, **before,
    )  # fmt: skip
    actual, _ = conv2d(
        inner, second, bias, (1, 1), (1, 1), moments=moments, norm_weight=maps[2], norm_bias=maps[3],
        residual=kept_too, output_scale=0.5**0.5, **before,
    )  # fmt: skip
    assert relative_error(actual, (y + kept) * 0.5**0.5) <= OP[torch.float32]


@pytest.mark.parametrize("backend", BACKENDS)
def test_moments_hold_at_a_large_mean(backend):
    torch.manual_seed(0)
    x = 1000 + normal(2, 8, 12, 11)
    exact = group_norm(x.double(), 2, backend="reference")
    eye = torch.eye(8)[None, :, :, None, None]
    moments = group_moments(x, 2, backend=backend)
    actual, _ = conv2d(x, eye, moments=moments, eps=1e-5, backend=backend)
    assert relative_error(actual, exact) <= 2e-4  # x itself has 24 bits, 10 of them for the mean
    shifted, found = conv2d(x - 1000, eye, torch.full((1, 8), 1000.0), num_groups=2, backend=backend)
    assert relative_error(found, group_moments(shifted.double(), 2, backend="reference")) <= OP[torch.float32]
    scatter = group_moments(shifted.double(), 2, backend="reference")[..., 1]
    assert relative_error(found[..., 1], scatter) <= OP[torch.float32]


CALLS = {  # name that begins with an op's -> kernel's arguments in the order of its schema
    "conv2d": lambda: _by_schema(*block(2, 4, 8, 4, (3, 4))),
    "conv2d with skip": lambda: _by_schema(*straddling(2, 4, (12, 6), 4, (3, 2), (3, 4))),
    "conv2d with mask": lambda: _by_schema(*masked(straddling(2, 4, (12, 6), 4, (3, 2), (3, 4)), 2)),
    "conv2d_sum": lambda: _sum_by_schema(),
    "group_moments": lambda: (normal(2, 6, 12, 13), 3),
}


def _by_schema(arguments, options):
    return (*ConvBlock.of(*arguments, **options).flat(), "auto")


def _sum_by_schema():
    x = normal(4, 8, 3, 4)
    block = ConvBlock.of(x, normal(2, 3, 8, 3, 3), normal(2, 3), (2, 1), (1, 1), **norm(x, 4, 2))
    return (*block.flat(), [0.25, 0.75])


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", CALLS)
def test_opcheck_gradients_nan_and_empty_batch(name, backend):
    torch.manual_seed(0)
    op = OPS[name.split()[0]]
    kernel = getattr(torch.ops.fastens, op.kernels[backend]).default
    arguments = CALLS[name]()
    assert set(torch.library.opcheck(kernel, arguments).values()) == {"SUCCESS"}
    doubles = [
        t.requires_grad_() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in in_double(arguments)
    ]
    assert torch.autograd.gradcheck(op.default, doubles, fast_mode=True)
    leaves = [t for t in doubles if isinstance(t, torch.Tensor) and t.requires_grad]
    found = []
    for run in (kernel, op.default):  # a kernel's gradient goes by way of the reference
        outputs = pytree.tree_leaves(run(*doubles))
        gradients = torch.autograd.grad([y.square().sum() for y in outputs], leaves)
        found.append([*outputs, *gradients])
    torch.testing.assert_close(*found)
    x = arguments[0].clone()
    x[1, 2, 1, 1] = torch.nan
    with torch.no_grad():
        outputs = [run(x, *arguments[1:]) for run in (kernel, op.default)]
    for actual, expected in zip(*(y if isinstance(y, tuple) else (y,) for y in outputs), strict=True):
        assert torch.equal(actual.isnan(), expected.isnan())
        assert actual.isnan().any()
    rows = len(x)
    empty = [t[:0] if isinstance(t, torch.Tensor) and len(t) == rows else t for t in arguments]
    y = kernel(*empty)
    assert (y[0] if isinstance(y, tuple) else y).shape[0] == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["conv2d", "conv2d_sum"])
def test_compiles_whole(name, backend):
    torch.manual_seed(0)
    x, weight, bias = normal(4, 6, 4, 4), normal(2, 4, 6, 3, 3), normal(2, 4)
    torch.compiler.reset()

    def run(x, backend=backend):
        moments = group_moments(x, 3, backend=backend)
        if name == "conv2d_sum":
            return conv2d_sum(x, weight, bias, [0.5, 0.5], (1, 1), (1, 1), moments=moments, backend=backend) + 1
        y, found = conv2d(x, weight, bias, (1, 1), (1, 1), moments=moments, num_groups=2, backend=backend)
        return y + found.mean()

    expected = run(x, "reference")
    assert relative_error(torch.compile(run, fullgraph=True, backend="aot_eager")(x), expected) <= OP[torch.float32]


@pytest.mark.parametrize("backend", KERNELS)
def test_gradients_of_a_module_are_the_librarys(backend):
    torch.manual_seed(0)
    layers = [nn.Conv2d(4, 6, 3, 2, 1) for _ in range(2)]
    weight, bias = (torch.stack([getattr(c, n).detach() for c in layers]).requires_grad_() for n in ("weight", "bias"))
    x = normal(4, 4, 6, 5).requires_grad_()
    y, _ = conv2d(x, weight, bias, (2, 2), (1, 1), backend=backend)
    y.square().sum().backward()
    given = x.detach().clone().requires_grad_()
    torch.cat([c(rows) for c, rows in zip(layers, given.chunk(2), strict=True)]).square().sum().backward()
    assert relative_error(x.grad, given.grad) <= OP[torch.float32]
    for k, layer in enumerate(layers):
        assert relative_error(weight.grad[k], layer.weight.grad) <= OP[torch.float32]
        assert relative_error(bias.grad[k], layer.bias.grad) <= OP[torch.float32]


X, W = torch.zeros(4, 6, 5, 5), torch.zeros(2, 8, 6, 3, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: conv2d(X[:3], W), "x has 3 rows, expected a multiple of the 2 members"),
        (lambda: conv2d(X[:, :5], W), "x has 5 channels, weight expects 6"),
        (lambda: conv2d(X[0], W), r"x is \[6, 5, 5\]"),
        (lambda: conv2d(X[..., :2], W), "smaller than the kernel"),
        (lambda: conv2d(X, W, scale=torch.zeros(4, 6)), "scale without moments"),
        (lambda: conv2d(X, W, moments=torch.zeros(4, 4, 1, 2)), r"moments is \[4, 4, 1, 2\], expected \[4, G, 1, 2\]"),
        (lambda: conv2d(X, W, num_groups=3), "num_groups is 3, expected a divisor of the 8"),
        (lambda: conv2d(X, W, residual=X), r"residual is \[4, 6, 5, 5\], expected \[4, 8, 3, 3\]"),
        (lambda: conv2d(X, W, activation="relu"), "activation 'relu' is unknown"),
        (lambda: conv2d(X, W, tiling="tall"), "tiling 'tall' is unknown"),
        (lambda: conv2d(X, W, offsets=torch.tensor([0, 1, 4]), shared=True), "shared rows have neither"),
        (lambda: conv2d(X, W, skip=X), r"x and skip have 6 \+ 6 channels, weight expects 6"),
        (lambda: conv2d(X[:, :4], W, skip=X[:3, :2]), r"skip is \[3, 2, 5, 5\], expected \[4, 2, 5, 5\]"),
        (lambda: conv2d(X[:, :4], W, skip=X[:, :2].double()), "skip is torch.float64, expected torch.float32"),
        (lambda: conv2d(X[:, :4], W, skip=X[:, :2], shared=True), "shared rows have no skip"),
        (lambda: conv2d(X[:, :4], W, skip=X[:, :2], moments=torch.zeros(4, 2, 1, 2)), "skip_moments belong together"),
        (lambda: conv2d(X, W, skip_moments=torch.zeros(4, 2, 1, 2)), "skip_moments without moments"),
        (
            lambda: conv2d(
                X[:, :4], W, skip=X[:, :2], moments=torch.zeros(4, 2, 1, 2), skip_moments=torch.zeros(4, 2, 1, 2)
            ),
            r"skip_moments is \[4, 2, 1, 2\], expected \[4, 1, 1, 2\], groups of 2",
        ),
        (lambda: conv2d(X, W, moments=torch.zeros(4, 3, 1, 2), norm_groups=2), "norm_groups is 2, expected a divisor"),
        (lambda: conv2d(X, W, norm_groups=2), "norm_groups without moments"),
        (lambda: conv2d(X, W, mask=torch.zeros(4, 5, 5, 1)), r"mask is torch.float32 .*expected int32 \[4, 5, 5, 1\]"),
        (lambda: conv2d(X, W, mask=torch.zeros(4, 5, 5, 1).int(), shared=True), "shared rows have no mask"),
        (lambda: conv2d_sum(X, W, None, [1.0]), "1 member_weights, expected 2"),
        (lambda: conv2d_sum(X, W, None, [1.0, 1.0], residual=torch.zeros(4, 8, 3, 3)), "a norm and an activation"),
        (lambda: group_moments(X, 4), "with 4 groups"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
