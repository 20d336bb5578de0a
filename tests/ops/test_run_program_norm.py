"""Normalisation and attention steps: the kernels against the reference and against torch."""

import pytest
import torch
import torch.nn.functional as F

from fastens import _native
from fastens.ops.run_program import available
from fastens.program import steps
from fastens.program.steps import Image, Slot
from tests.ops.programs import Memory, assert_close, random
from tests.tolerances import OP

pytestmark = pytest.mark.skipif(not available(), reason=f"no compiled library: {_native.status()}")
AFFINES = [(), ("weight", "bias"), ("weight",), ("bias",), ("row_scale", "row_shift"), ("row_shift",)]
AFFINES += [("row_scale",), ("weight", "bias", "row_scale", "row_shift")]


class Affine:
    """Scale and shift by member and by row, those of `names`, in memory and as torch applies them."""

    def __init__(self, memory, names, members, rows_per_member, channels, given=None):
        self.names = names
        self.members = torch.tensor(given or range(members)).repeat_interleave(rows_per_member)
        self.given = steps.NONE if given is None else memory.put_members(given)
        rows, self.row = len(self.members), channels + 5
        self.values = {
            "weight": random(members, channels),
            "bias": random(members, channels, seed=1),
            "row_scale": random(rows, channels, seed=2),
            "row_shift": random(rows, channels, seed=3),
        }
        self.at = dict.fromkeys(self.values, steps.NONE)
        for name in names:
            by_row = name.startswith("row")
            value = F.pad(self.values[name], (0, 5), value=torch.nan) if by_row else self.values[name]
            self.at[name] = memory.put(value, Slot.ARENA if by_row else Slot.WEIGHTS)

    def words(self):
        at = self.at
        return at["weight"], at["bias"], at["row_scale"], self.row, at["row_shift"], self.row

    def __call__(self, y):
        """Apply to [R, C, ...] in float64."""

        def value(name):
            x = self.values[name].double()
            x = x if name.startswith("row") else x[self.members]
            return x.reshape(x.shape + (1,) * (y.dim() - 2))

        for name in self.names:
            y = {
                "weight": lambda y=y: y * value("weight"),
                "bias": lambda y=y: y + value("bias"),
                "row_scale": lambda y=y: y * (1 + value("row_scale")),
                "row_shift": lambda y=y: y + value("row_shift"),
            }[name]()
        return y


def check_norm(sources, groups, *, members=2, given=None, affine=("weight", "bias"), splits=1, eps=1e-5, num_threads=1):
    """Run a normalisation of images [R, C, H, W]; return scales and shifts [R, C]."""
    memory = Memory()
    rows, _, height, width = sources[0].shape
    x = torch.cat(sources, 1).double()
    channels = x.shape[1]
    rows_per_member = rows // len(given or range(members))
    applied = Affine(memory, affine, members, rows_per_member, channels, given)
    images = [memory.image(source) for source in sources] + [Image()]
    views = memory.room(rows, channels), memory.room(rows, channels)
    step = steps.Norm(
        rows,
        rows_per_member,
        splits,
        (images[0], images[1]),
        height,
        width,
        groups,
        *applied.words(),
        eps,
        views[0].at,
        views[1].at,
        applied.given,
        tasks=rows * splits,
    )
    scale, shift = memory.check(step, *views, num_threads=num_threads)
    clean = x[x.isfinite().flatten(1).all(1)]
    if len(clean) == len(x):
        y = applied(F.group_norm(x, groups, eps=eps))
        # what rounding a scale and a shift to float32 leaves of the values
        magnitude = float((x * scale[:, :, None, None]).abs().max() / y.abs().max())
        actual = x * scale[:, :, None, None].double() + shift[:, :, None, None].double()
        assert_close(actual, y, OP[torch.float32] + torch.finfo(torch.float32).eps * magnitude)
    return scale, shift


@pytest.mark.parametrize(
    ("channels", "groups"),
    [(1, 1), (3, 1), (3, 3), (17, 1), (20, 4), (32, 32), (37, 37), (40, 8), (64, 32), (70, 2), (130, 10), (320, 32)],
)
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (8, 8)])
def test_groups(channels, groups, size):
    eps = 1e-5 if size != (1, 1) or channels > groups else 1.0
    for splits in {1, min(2, groups), groups}:
        check_norm([random(4, channels, *size)], groups, splits=splits, eps=eps, num_threads=2)


@pytest.mark.parametrize("affine", AFFINES, ids="-".join)
@pytest.mark.parametrize("members", [1, 2, 6])
def test_norm_affine(affine, members):
    check_norm([random(6, 40, 3, 5)], 8, members=members, affine=affine)
    check_norm([random(6, 40, 3, 5)], 8, members=members, given=(members - 1, 0, members - 1), affine=affine)


@pytest.mark.parametrize(
    ("first", "second", "groups"), [(17, 20, 1), (17, 20, 37), (3, 37, 8), (64, 32, 32), (1, 1, 1)]
)
@pytest.mark.parametrize("splits", [1, 2])
def test_norm_of_joined_sources(first, second, groups, splits):
    check_norm([random(4, first, 3, 5), random(4, second, 3, 5, seed=1)], groups, splits=min(splits, groups))


def test_norm_of_rows_that_share_a_source():
    memory = Memory()
    image = memory.image(random(2, 20, 3, 5))
    views = memory.room(6, 20), memory.room(6, 20)
    none = [steps.NONE, steps.NONE, steps.NONE, 0, steps.NONE, 0]
    step = steps.Norm(6, 2, 1, (image, Image()), 3, 5, 4, *none, 1e-5, views[0].at, views[1].at, tasks=6)
    scale, _ = memory.check(step, *views)
    assert torch.equal(scale[:2], scale[4:])


@pytest.mark.parametrize("size", [(1, 16), (16, 16), (64, 64), (1, 4096)])
@pytest.mark.parametrize("channels", [8, 64])
def test_norm_of_values_far_from_zero(size, channels):
    """The variance is taken around the mean: squares of 1000 would leave three digits of it."""
    check_norm([random(2, channels, *size) + 1e3], 4, affine=())
    check_norm([random(2, channels, *size) * 1e-3 - 1], 4, affine=())


def test_norm_of_constants_and_small_values():
    scale, shift = check_norm([torch.full((2, 8, 4, 4), 3.0)], 2, affine=(), eps=1e-6)
    assert torch.allclose(scale, torch.tensor(1e3))
    assert torch.allclose(shift, torch.tensor(-3e3))
    check_norm([random(2, 8, 4, 4) * 1e-4], 2, affine=(), eps=1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_row_of_a_norm_stays_alone(value):
    x = random(4, 16, 3, 5).clone()
    clean = check_norm([x], 4)
    x[1, 5, 2, 3] = value
    for before, after in zip(clean, check_norm([x], 4, num_threads=2), strict=True):
        assert torch.equal(before[[0, 2, 3]], after[[0, 2, 3]])
        assert torch.equal(before[1, :4], after[1, :4])  # another group
        assert not after[1, 4:8].isfinite().all()


def check_layer_norm(x, *, members=2, given=None, affine=("weight", "bias"), eps=1e-5, num_threads=1):
    """Run a layer normalisation of [R, tokens, C]; return its result."""
    memory = Memory()
    rows, tokens, channels = x.shape
    rows_per_member = rows // len(given or range(members))
    applied = Affine(memory, affine, members, rows_per_member, channels, given)
    wide = F.pad(x, (0, 3, 0, 1), value=torch.nan)
    view = memory.room(rows, tokens, channels, stride=((tokens + 2) * (channels + 7), channels + 7, 1))
    step = steps.LayerNorm(
        rows,
        rows_per_member,
        tokens,
        channels,
        memory.put(wide),
        *wide.stride()[:2],
        *applied.words(),
        eps,
        view.at,
        *view.stride[:2],
        applied.given,
        tasks=rows,
    )
    (actual,) = memory.check(step, view, num_threads=num_threads)
    expected = F.layer_norm(x.double(), (channels,), eps=eps)
    assert_close(actual, applied(expected.transpose(1, 2)).transpose(1, 2))
    return actual


@pytest.mark.parametrize("channels", [2, 3, 15, 16, 17, 37, 64, 130, 768])
@pytest.mark.parametrize("tokens", [1, 7])
def test_layer_norm(channels, tokens):
    check_layer_norm(random(4, tokens, channels), num_threads=2)


@pytest.mark.parametrize("affine", AFFINES, ids="-".join)
@pytest.mark.parametrize("members", [1, 2, 6])
def test_layer_norm_affine(affine, members):
    check_layer_norm(random(6, 3, 37), members=members, affine=affine)
    check_layer_norm(random(6, 3, 37), members=members, given=(members - 1, 0, members - 1), affine=affine)


@pytest.mark.parametrize("channels", [16, 37, 768, 4096])
def test_layer_norm_of_values_far_from_zero(channels):
    check_layer_norm(random(2, 3, channels) + 1e3, affine=())
    check_layer_norm(random(2, 3, channels) * 1e-3 - 1, affine=())


def test_layer_norm_of_constants():
    assert (check_layer_norm(torch.full((2, 3, 37), 5.0), affine=()) == 0).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_token_of_a_layer_norm_stays_alone(value):
    x = random(4, 3, 37).clone()
    clean = check_layer_norm(x)
    x[1, 2, 5] = value
    bad = check_layer_norm(x)
    assert bad[1, 2].isnan().all()
    bad[1, 2] = clean[1, 2]
    assert torch.equal(bad, clean)


def check_attention(q, k, v, *, scale=None, query_chunk=4, num_threads=1, channels_first=()):
    """Run attention over [R, heads, tokens, width], those of `channels_first` laid out so; return its result."""
    memory = Memory()
    rows, heads, queries, width = q.shape
    keys, value_width = v.shape[2:]
    scale = width**-0.5 if scale is None else scale
    token = heads * value_width + 1
    stride = ((queries + 1) * token, value_width, token, 1)
    if "out" in channels_first:
        stride = (heads * value_width * (queries + 3), value_width * (queries + 3), 1, queries + 3)
    view = memory.room(rows, heads, queries, value_width, stride=stride)
    step = steps.Attention(
        rows,
        heads,
        queries,
        keys,
        width,
        value_width,
        query_chunk,
        memory.heads(q, "q" in channels_first),
        memory.heads(k, "k" in channels_first),
        memory.heads(v, "v" in channels_first),
        steps.Heads(view.at, *stride),
        scale,
        tasks=rows * heads * -(-queries // query_chunk),
    )
    (actual,) = memory.check(step, view, num_threads=num_threads)
    assert_close(actual, F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=scale))
    return actual


@pytest.mark.parametrize("keys", [1, 2, 15, 16, 17, 77, 256])
@pytest.mark.parametrize(("width", "value_width"), [(1, 1), (8, 8), (37, 20), (40, 40), (64, 130)])
@pytest.mark.parametrize("queries", [1, 13])
def test_attention(keys, width, value_width, queries):
    q, k, v = random(2, 3, queries, width), random(2, 3, keys, width, seed=1), random(2, 3, keys, value_width, seed=2)
    check_attention(q, k, v, num_threads=2)


@pytest.mark.parametrize("query_chunk", [1, 3, 13, 64])
@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_attention_cuts(query_chunk, num_threads):
    q, k, v = random(2, 3, 13, 16), random(2, 3, 20, 16, seed=1), random(2, 3, 20, 16, seed=2)
    check_attention(q, k, v, query_chunk=query_chunk, num_threads=num_threads)


@pytest.mark.parametrize("channels_first", ["q", "k", "v", "out", ("q", "k", "v", "out")], ids="".join)
@pytest.mark.parametrize("keys", [5, 16, 77])
def test_attention_of_channels_before_tokens(channels_first, keys):
    q, k, v = random(2, 3, 13, 24), random(2, 3, keys, 24, seed=1), random(2, 3, keys, 37, seed=2)
    actual = check_attention(q, k, v, channels_first=channels_first, num_threads=2)
    assert torch.equal(actual, check_attention(q, k, v))


def test_attention_over_many_keys():
    q, k, v = random(1, 1, 5, 16), random(1, 1, 10_000, 16, seed=1), random(1, 1, 10_000, 16, seed=2)
    check_attention(q, k, v)
    check_attention(q, k, v + 1)


@pytest.mark.parametrize("scale", [0.0, 1.0, -1.0, 1e3, 1e30])
def test_attention_with_large_logits(scale):
    """One key takes all, without overflow: the largest score is subtracted first."""
    q, k, v = torch.eye(4)[None, None] * 8, torch.eye(4)[None, None] * 16 - 4, random(1, 1, 4, 5)
    check_attention(q, k, v, scale=scale)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_query_or_row_of_attention_stays_alone(value):
    q, k, v = random(2, 3, 5, 8).clone(), random(2, 3, 20, 8, seed=1).clone(), random(2, 3, 20, 8, seed=2).clone()
    clean = check_attention(q, k, v)
    q[1, 2, 3] = value
    bad = check_attention(q, k, v)
    assert bad[1, 2, 3].isnan().all()
    bad[1, 2, 3] = clean[1, 2, 3]
    assert torch.equal(bad, clean)
    q[1, 2, 3] = 0
    k[0, 1, 7] = torch.nan
    bad = check_attention(q, k, v)
    assert bad[0, 1].isnan().all()
    assert torch.equal(bad[0, [0, 2]], clean[0, [0, 2]])


@pytest.mark.parametrize(("rows", "count", "tasks"), [(5, 7, 2), (1, 64, 1), (9, 1, 4)])
def test_lines_of_a_table_by_member(rows, count, tasks):
    memory, table = Memory(), random(3, count)
    members = [2, 0, 1, 1, 2, 0, 0, 2, 1][:rows]
    view = memory.room(rows, count)
    step = steps.Gather(rows, count, memory.put(table, Slot.WEIGHTS), memory.put_members(members), view.at, tasks=tasks)
    (actual,) = memory.check(step, view, num_threads=2)
    assert torch.equal(actual, table[members])
