"""MC Dropout as launches: the tests of its plans again, on the launches that a GPU runs."""

import pytest
import torch

from fastens.engine import planned
from fastens.plan.gpu import calls
from fastens.plan.gpu.passes import masks as drawing
from fastens.reference.dropout import dropout
from tests.fold.test_plan_masks import (  # noqa: F401  (they are collected here too)
    DROPPING_UNET,
    Called,
    same_as_the_loop,
    test_drawn_rules_under_masks,
    test_every_kind_of_dropout_is_planned,
    test_networks_that_were_built_without,
    test_one_plan_draws_the_masks_of_every_trajectory,
)
from tests.networks import randomised

# (rows, places, channels, steps of an element's number): images with the space innermost, tokens, and what divides by
# neither four elements nor the words and tiles of the kernels
SHAPES = [(4, 64, 40, (1, 64)), (3, 25, 7, (1, 25)), (2, 1, 70, (70, 1)), (2, 33, 36, (36, 1)), (3, 5, 9, (9, 1))]


@pytest.fixture(autouse=True)
def _launches(monkeypatch):
    monkeypatch.setattr(planned, "launches_on", lambda _: True)


@pytest.mark.parametrize("masks", ["fixed", "fresh"])
def test_layers_that_are_functions_are_launches(masks):
    x = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    report = same_as_the_loop(randomised(Called, 0), masks, [((x,), {}), ((0.5 * x,), {}), ((-x,), {})])
    (plan,) = report.plans
    assert {name for name in plan if name.startswith("aten.")} <= {"aten.mean.dim"}


@pytest.mark.parametrize("most", [drawing._MOST_DRAWN, 0])
def test_one_launch_draws_all_masks_that_memory_holds(most, monkeypatch):
    monkeypatch.setattr(drawing, "_MOST_DRAWN", most)
    x, t = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([5, 6, 7, 8])
    report = same_as_the_loop(randomised(*DROPPING_UNET), "fresh", [((x, t), {}), ((0.5 * x, t), {})], p=0.3)
    (plan,) = report.plans
    assert plan["draw"] == (1 if most else 12)


def expected_keeps(rows, places, channels, steps, members, samples, p, key, evaluation):
    ones = torch.ones(rows, places * channels)
    kept = dropout(ones, members, samples, p, key, evaluation) > 0
    return kept.as_strided((rows, places, channels), (places * channels, *steps))


def unpacked(bits, channels):
    return (bits.unsqueeze(-1) >> torch.arange(32) & 1).flatten(-2)[..., :channels].bool()


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("by_member", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_bits_are_those_of_dropout(shape, by_member, backend):
    if backend == "triton":
        pytest.importorskip("triton")
    rows, places, channels, steps = shape
    drawn = torch.tensor([2**31 + 7, 5, -(2**62) + 12345])
    samples = torch.arange(rows) * 1000
    members = torch.arange(rows).flip(0) if by_member else torch.arange(rows) // 2
    bits = torch.full((rows, places, -(-channels // 32)), -1, dtype=torch.int32)
    for p in (0.3, 1.0):
        threshold = round(p * 2**32)
        given = (members if by_member else None, samples, 2, threshold, [channels], [steps])
        calls.draw([bits], drawn, [1], *given, backend)
        expected = expected_keeps(*shape, members, samples, p, int(drawn[2]), int(drawn[0]))
        found = unpacked(bits, channels)
        if p == 1:  # 2^32 is no threshold of 32 bits: what is kept by one chance in 2^32 is multiplied by a scale of 0
            assert not found.any()
        else:
            assert torch.equal(found, expected)
            assert 0.4 < found.float().mean() < 0.95


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_masks_of_one_launch_are_those_of_several(backend):
    if backend == "triton":
        pytest.importorskip("triton")
    shapes = [(4, *shape[1:]) for shape in SHAPES]
    drawn = torch.tensor([3, *(7**i - 2**50 for i in range(len(shapes)))])
    samples, members = torch.arange(4) + 5, torch.arange(4) // 2
    bits = [torch.full((4, places, -(-channels // 32)), -1, dtype=torch.int32) for _, places, channels, _ in shapes]
    _, _, channels, steps = zip(*shapes, strict=True)
    keys = list(range(len(shapes)))[::-1]
    calls.draw(bits, drawn, keys, None, samples, 2, round(0.4 * 2**32), channels, steps, backend)
    for own, key, shape in zip(bits, keys, shapes, strict=True):
        expected = expected_keeps(*shape, members, samples, 0.4, int(drawn[1 + key]), 3)
        assert torch.equal(unpacked(own, shape[2]), expected)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [7, 40])
@pytest.mark.parametrize("of_members", [False, True])
def test_bits_are_applied_to_images_of_any_strides(of_members, channels, dtype, backend):
    if backend == "triton":
        pytest.importorskip("triton")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 5, channels, 3, generator=generator).to(dtype).transpose(1, 2)
    x[0, 0, 0, 0] = torch.nan
    rows = 3 if of_members else 6
    bits = torch.randint(-(2**31), 2**31, (rows, 5, 3, -(-channels // 32)), generator=generator, dtype=torch.int32)
    out = torch.full((6, channels, 5, 3), 7.0, dtype=dtype).contiguous(memory_format=torch.channels_last)
    calls.masked(out, x, bits, 1.25, backend)
    kept = unpacked(bits, channels).repeat_interleave(6 // rows, 0).movedim(-1, 1)
    expected = (x.float() * (kept * 1.25)).to(dtype)
    truncated = backend == "triton" and dtype == torch.bfloat16  # by the interpreter, where hardware rounds
    torch.testing.assert_close(out, expected, rtol=2**-7 if truncated else 0, atol=0, equal_nan=True)
