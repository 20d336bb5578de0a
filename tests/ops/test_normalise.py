"""A group norm by moments that were taken before, against the norm that takes its own."""

import pytest
import torch

from fastens.ops.group_moments import group_moments
from fastens.ops.group_norm import group_norm
from fastens.program.block import Prologue
from tests.ops.cases import DTYPES, needs_triton
from tests.tolerances import OP, relative_error

pytestmark = needs_triton
RAGGED = torch.tensor([0, 1, 1, 4])

# members, rows, channels of x and skip, groups of their moments, groups of the norm, space
CASES = {
    "as many groups": (2, 4, (16, 0), (4, 0), 0, (3, 5)),
    "sub-groups": (3, 3, (24, 0), (12, 0), 4, (4, 4)),
    "one group": (1, 2, (5, 0), (5, 0), 1, (7,)),
    "a skip": (2, 2, (8, 8), (2, 2), 0, (5, 5)),
    "a group that straddles": (5, 5, (16, 8), (8, 4), 4, (3, 3)),  # groups of 6 channels, the third from both
    "several tiles of channels": (2, 2, (136, 60), (34, 15), 7, (3, 2)),  # groups of 28 channels
    "several spans": (2, 2, (12, 4), (6, 2), 4, (19, 14)),
    "joined before": (1, 2, (8, 8), (8, 8), 2, (53, 40)),
    "17 members": (17, 17, (4, 2), (2, 1), 1, (2, 2)),
    "8 members": (8, 8, (6, 3), (2, 1), 3, (1, 1)),
    "no rows": (2, 0, (4, 0), (2, 0), 0, (3, 3)),
}


def normal(*shape, dtype):
    return torch.randn(shape, dtype=torch.double).to(dtype)


def last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def case(name, dtype, layout=last):
    """Images, and the norm of both by moments taken in full precision."""
    members, rows, channels, groups, norm_groups, space = CASES[name]
    x, skip = (layout(3 * normal(rows, c, *space, dtype=dtype) + 1) if c else None for c in channels)
    total = sum(channels)
    norm = {name: normal(members, total, dtype=dtype) for name in ("weight", "bias")}
    norm |= {name: normal(rows, total, dtype=dtype) for name in ("scale", "shift")} | {"eps": 1e-3}
    wide = torch.promote_types(dtype, torch.float32)
    moments = [
        None if image is None else group_moments(image.to(wide), count, backend="reference")
        for image, count in zip((x, skip), groups, strict=True)
    ]
    return x, skip, *moments, norm_groups or sum(groups), norm


def expected_of(x, skip, norm_groups, norm, activation, offsets=None):
    both = (x if skip is None else torch.cat([x, skip], 1)).double()
    norm = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in norm.items()}
    return group_norm(both, norm_groups, **norm, offsets=offsets, activation=activation, backend="reference")


def normalised(x, skip, moments, skip_moments, norm_groups, norm, activation, **options):
    from fastens.kernels.group_norm import normalise

    names = {"weight": "norm_weight", "bias": "norm_bias"}
    prologue = Prologue(
        moments, **{names.get(name, name): value for name, value in norm.items()}, activation=activation, skip=skip,
        skip_moments=skip_moments, norm_groups=norm_groups,
    )  # fmt: skip
    return normalise(x, prologue, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_norm(name, dtype):
    torch.manual_seed(0)
    layouts = (last, torch.Tensor.contiguous) if dtype == torch.float32 else (last,)
    for layout in layouts:
        *images, norm_groups, norm = case(name, dtype, layout)
        expected = expected_of(*images[:2], norm_groups, norm, "silu")
        garbage = torch.full_like(expected, torch.nan, dtype=dtype)
        del garbage
        actual = normalised(*images, norm_groups, norm, "silu")
        assert actual.dtype == dtype
        assert actual.movedim(1, -1).is_contiguous() or layout is not last
        assert relative_error(actual, expected) <= OP[dtype]


@pytest.mark.parametrize("missing", ["weight", "bias", "scale", "shift"])
def test_parts_of_a_norm_and_ragged_rows(missing):
    torch.manual_seed(0)
    x, skip, moments, skip_moments, norm_groups, norm = case("several spans", torch.float32)
    norm.pop(missing)
    expected = expected_of(x, skip, norm_groups, norm, "none")
    assert relative_error(
        normalised(x, skip, moments, skip_moments, norm_groups, norm, "none"), expected
    ) <= OP[torch.float32]  # fmt: skip
    x = torch.randn(4, 6, 3, 3)
    norm = {"weight": torch.randn(3, 6), "bias": torch.randn(3, 6), "eps": 1e-3}
    actual = normalised(x, None, group_moments(x, 3), None, 0, norm, "gelu", offsets=RAGGED)
    expected = torch.nn.functional.gelu(expected_of(x, None, 3, norm, "none", RAGGED))
    assert relative_error(actual, expected) <= OP[torch.float32]


def test_writes_where_it_is_told():
    """Into channels of a wider image of another dtype, from channels of wider ones, without a copy."""
    torch.manual_seed(0)
    x, skip, moments, skip_moments, norm_groups, norm = case("a group that straddles", torch.bfloat16)
    wide = last(torch.full((5, 40, 3, 3), torch.nan, dtype=torch.bfloat16))
    wide[:, 3:19], wide[:, 20:28] = x, skip
    out = last(torch.full((5, 30, 3, 3), torch.nan))
    into = out[:, 4:28]
    y = normalised(
        wide[:, 3:19], wide[:, 20:28], moments, skip_moments, norm_groups, norm, "silu", into=into
    )  # fmt: skip
    assert y is into
    # in float32: what is stored is not rounded to bfloat16
    assert relative_error(into, expected_of(x, skip, norm_groups, norm, "silu")) <= OP[torch.float32]
    assert out[:, :4].isnan().all()
    assert out[:, 28:].isnan().all()


def test_nan_stays_in_its_group():
    x, _, _, _, _, norm = case("sub-groups", torch.float32)
    x[1, 7, 2, 2] = torch.nan
    y = normalised(x, None, group_moments(x, 12), None, 4, norm, "silu")
    assert y[1, 6:12].isnan().all()  # the second of four groups of 6
    y[1, 6:12] = 0
    assert not y.isnan().any()


@pytest.mark.parametrize(
    ("groups", "norm_groups"), [((4, 0), 3), ((2, 4), 3), ((4, 2), 4)], ids=["of moments", "unequal", "of channels"]
)
def test_groups_that_do_not_fit_are_named(groups, norm_groups):
    x, skip = torch.randn(2, 8, 2, 2), torch.randn(2, 4, 2, 2) if groups[1] else None
    moments, skip_moments = group_moments(x, groups[0]), None if skip is None else group_moments(skip, groups[1])
    with pytest.raises(ValueError, match="do not make up"):
        normalised(x, skip, moments, skip_moments, norm_groups, {}, "none")


def test_few_spans_are_one_launch(monkeypatch):
    from fastens.kernels import _normalise

    launched = []
    for name in ("join_moments_kernel", "normalise_kernel"):
        kernel = getattr(_normalise, name)
        recorder = type(name, (), {"__getitem__": lambda _, grid, n=name, k=kernel: launched.append(n) or k[grid]})()
        monkeypatch.setattr(_normalise, name, recorder)
    for name, kernels in (("several spans", ["normalise_kernel"]),
                          ("joined before", ["join_moments_kernel", "normalise_kernel"])):  # fmt: skip
        launched.clear()
        monkeypatch.setattr(_normalise, "MOST_MOMENTS", 64)
        *images, norm_groups, norm = case(name, torch.float32)
        actual = normalised(*images, norm_groups, norm, "none")
        assert launched == kernels
        assert relative_error(actual, expected_of(*images[:2], norm_groups, norm, "none")) <= OP[torch.float32]
