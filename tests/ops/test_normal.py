"""Gaussian noise from counters: agreement of backends, what a number depends on, opcheck."""

import pytest
import torch

from fastens.ops.normal import normal
from tests.ops.cases import needs_triton

BACKENDS = ("reference", pytest.param("triton", marks=needs_triton))
SEEDS = (0, 11, 2**63, 2**64 - 1, -5)


@needs_triton
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 7, 41), (515,)])
def test_kernel_equals_reference_to_the_last_bits(shape, seed):
    samples = torch.tensor([0, 7, 2**31 + 3, 2**40 + 1])
    for offset in (0, 2**32 - 1, torch.tensor([3, 1, 2**31, 0])):
        ours, reference = (normal(seed, offset, samples, shape, backend=each) for each in ("triton", "reference"))
        assert ours.dtype == torch.float32
        assert ours.shape == (4, *shape)
        # logarithm and cosine in float64 differ in their last bits, which may round to the next float32
        assert torch.allclose(ours, reference, rtol=2.0**-23, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sample_has_numbers_of_its_own(backend):
    samples, draws = torch.tensor([4, 9, 4]), torch.tensor([1, 1, 2])
    drawn = normal(3, draws, samples, (2, 6), backend=backend)
    for i in range(3):
        alone = normal(torch.tensor(3), draws[i], samples[i : i + 1], (2, 6), backend=backend)
        assert torch.equal(drawn[i], alone[0])
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert normal(3, 0, samples[:0], (2,), backend=backend).shape == (0, 2)
    assert normal(3, 0, samples, (0, 2), backend=backend).shape == (3, 0, 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_normal(backend):
    drawn = normal(1, 0, torch.arange(4), (5000,), backend=backend).double().flatten()
    assert abs(float(drawn.mean())) < 4 / 20000**0.5
    assert abs(float(drawn.square().mean()) - 1) < 4 * (2 / 20000) ** 0.5
    assert abs(float((drawn[::2] * drawn[1::2]).mean())) < 4 / 10000**0.5


@pytest.mark.parametrize("operator", ["normal", pytest.param("_normal_triton", marks=needs_triton)])
def test_opcheck(operator):
    arguments = (torch.tensor(5), torch.tensor([1, 2]), torch.tensor([3, 4]), [3, 2])
    results = torch.library.opcheck(getattr(torch.ops.fastens, operator).default, arguments)
    assert set(results.values()) == {"SUCCESS"}


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"samples is torch.int32 \[2\], expected int64 \[B\]"):
        normal(0, 0, torch.zeros(2, dtype=torch.int32), (3,))
    with pytest.raises(ValueError, match=r"offset is torch.int64 \[3\], expected int64, one or \[2\]"):
        normal(0, torch.zeros(3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), (3,))
