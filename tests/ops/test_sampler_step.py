"""A sampler's step in one pass: agreement of backends, its noise, gradients, opcheck, errors."""

import pytest
import torch

from fastens.ops.normal import normal
from fastens.ops.sampler_step import KINDS, sampler_step
from tests.ops.cases import BACKENDS, KERNELS
from tests.tolerances import OP, relative_error

TRITON = KERNELS[1]


def arguments(kind, dtype=torch.float32, shape=(3, 2, 5, 7), network_dtype=None):
    torch.manual_seed(0)
    x, output, second = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
    options = {"clip": (-0.5, 0.8)} if kind in ("clipped", "data") else {}
    if kind == "corrected":
        options["second"] = second.to(network_dtype or dtype)
    row = torch.tensor([0.9, -0.3, 0.4, 1.2, 0.7], dtype=dtype)
    return (x.to(dtype), output.to(network_dtype or dtype), row, kind), options


def noise_of(kind):
    numbers = {"seed": 2**63 + 5, "offset": torch.tensor(7), "samples": torch.tensor([4, 0, 2**33])}
    return {} if kind == "corrected" else numbers


@pytest.mark.parametrize("backend", [TRITON])
@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_kernel_equals_reference(kind, noisy, backend):
    noise = noise_of(kind) if noisy else {}
    for dtype, network_dtype in ((torch.float32,) * 2, (torch.float32, torch.bfloat16), (torch.float64,) * 2):
        for shape in ((3, 2, 5, 7), (3, 1), (3, 515)):
            given, options = arguments(kind, dtype, shape, network_dtype)
            ours, reference = (sampler_step(*given, **options, **noise, backend=b) for b in (backend, "reference"))
            assert ours.dtype == dtype
            assert relative_error(ours, reference) <= OP[torch.float32 if noisy else dtype]


@pytest.mark.parametrize("backend", [BACKENDS[0], TRITON])
def test_noise_is_that_of_normal(backend):
    (x, output, row, kind), _ = arguments("linear")
    noise = noise_of(kind)
    found = sampler_step(x, output, row, kind, **noise, backend=backend)
    expected = row[0] * x + row[1] * output + row[2] * normal(noise["seed"], 7, noise["samples"], x.shape[1:])
    assert relative_error(found, expected) <= OP[torch.float32]


@pytest.mark.parametrize("backend", [BACKENDS[0], TRITON])
@pytest.mark.parametrize("kind", KINDS)
def test_layouts_nan_and_no_rows(kind, backend):
    (x, output, row, _), options = arguments(kind)
    expected = sampler_step(x, output, row, kind, **options, backend="reference")
    last = [t.contiguous(memory_format=torch.channels_last) for t in (x, output)]
    before = [t.clone() for t in last]
    assert relative_error(sampler_step(*last, row, kind, **options, backend=backend), expected) <= OP[torch.float32]
    assert all(torch.equal(a, b) for a, b in zip(last, before, strict=True))
    output[1, 0, 2, 3] = torch.nan
    found = sampler_step(x, output, row, kind, **options, backend=backend)
    assert found.isnan().sum() == 1
    assert found[1, 0, 2, 3].isnan()
    few = {name: value[:0] if name == "second" else value for name, value in options.items()}
    assert sampler_step(x[:0], output[:0], row, kind, **few, backend=backend).shape == (0, 2, 5, 7)


@pytest.mark.covering(1)
@pytest.mark.parametrize("backend", [BACKENDS[0], TRITON])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_and_opcheck(kind, backend):
    (x, output, row, _), options = arguments(kind, torch.float64, (3, 4))
    leaves = [t.requires_grad_() for t in (x, output, row)]
    assert torch.autograd.gradcheck(
        lambda x, output, row: sampler_step(x, output, row, kind, **options, **noise_of(kind), backend=backend), leaves
    )
    operator = torch.ops.fastens.sampler_step if backend == "reference" else torch.ops.fastens._sampler_step_triton
    drawn = (torch.tensor(5), torch.tensor(1), torch.arange(3)) if kind == "linear" else (None,) * 3
    clip = options.get("clip", (0.0, 0.0))
    results = torch.library.opcheck(operator.default, (x, output, options.get("second"), row, kind, *clip, *drawn))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("ddim", {}, "kind 'ddim' is unknown"),
        ("linear", {"output": torch.zeros(3, 4)}, r"output is \[3, 4\], expected \[3, 2\]"),
        ("linear", {"row": torch.zeros(4)}, r"row torch.float32 \[4\]"),
        ("linear", {"row": torch.zeros(5, dtype=torch.float64)}, r"row torch.float64 \[5\]"),
        ("corrected", {}, "second is of 'corrected'"),
        ("linear", {"second": torch.zeros(3, 2)}, "second is of 'corrected'"),
        ("clipped", {}, r"clip is \[\], expected two numbers"),
        ("linear", {"clip": (0.0, 1.0)}, r"clip is \[0.0, 1.0\]"),
        ("linear", {"samples": torch.arange(3)}, "samples need seed and offset"),
        ("linear", {"samples": torch.arange(2), "seed": 0, "offset": 0}, r"samples is torch.int64 \[2\]"),
        ("linear", {"seed": 0}, "seed or offset without samples"),
    ],
)
def test_what_does_not_fit_is_named(kind, change, message):
    given = {"x": torch.zeros(3, 2), "output": torch.zeros(3, 2), "row": torch.zeros(5), "kind": kind} | change
    with pytest.raises(ValueError, match=message):
        sampler_step(**given)
