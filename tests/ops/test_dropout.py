"""Counter-based dropout: known answers, what a mask depends on, agreement of backends, gradients."""

import pytest
import torch

from fastens.ops.dropout import dropout
from tests.ops.cases import BACKENDS, DTYPES, KERNELS
from tests.tolerances import OP, relative_error


def rows(*numbers):
    return torch.tensor(numbers)


@pytest.mark.parametrize("backend", BACKENDS)
def test_known_answer_of_philox(backend):
    # Random123's kat_vectors, philox4x32-10: counter 0, key 0 -> 6627e8d5 e169c58d bc57ac4c 9b00dbd8.
    for word, bits in enumerate((0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)):
        for p, kept in ((bits / 2**32, True), ((bits + 1) / 2**32, False)):
            x = torch.zeros(1, 4, dtype=torch.float64)
            x[0, word] = 1
            assert bool(dropout(x, rows(0), None, p, 0, backend=backend).sum() > 0) is kept


@pytest.mark.covering(2)
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("key", [0, 1, 2**63 - 1, -5])
def test_kernels_equal_reference(dtype, key, backend):
    members, samples = rows(0, 4, 4), rows(0, 1, 2**31)
    for i, shape in enumerate(
        ((3,), (3, 1), (3, 63), (3, 2, 5, 13), (3, 4, 64), (3, 3, 2, 4), (3, 0), (0, 5), (3, 1030))
    ):
        x = torch.randn(shape).to(dtype)
        for numbers, evaluation in ((samples, 7), (samples, 2**40 + 2**31 + 3), (None, 0)):
            if backend == "triton" and (i + evaluation + key) % 3:  # the interpreter is slow
                continue
            p = (0.3, 0.7)[i % 2]  # below and above half of 32 bits
            drawn = (members[: len(x)], None if numbers is None else numbers[: len(x)], p, key, evaluation)
            forms = [x] if x.ndim < 3 else [x, x.movedim(1, -1).contiguous().movedim(-1, 1)]
            for form in forms:
                ours, reference = (dropout(form, *drawn, backend=each) for each in (backend, "reference"))
                assert ours.dtype == dtype
                assert torch.equal(ours == 0, reference == 0)
                assert relative_error(ours, reference) <= OP[dtype]
                if dtype in (torch.float32, torch.float64):
                    assert torch.equal(ours, reference)
                assert ours.is_contiguous() if backend == "native" else ours.stride() == form.stride()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_activation_before_it(activation, backend):
    for dtype in DTYPES:
        x = torch.randn(2, 7, 9).to(dtype)
        expected = dropout(x.double(), rows(1, 2), None, 0.4, 5, activation=activation, backend="reference")
        actual = dropout(x, rows(1, 2), None, 0.4, 5, activation=activation, backend=backend)
        assert relative_error(actual, expected) <= OP[dtype]
        assert torch.equal(actual == 0, expected == 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_mask_depends_on(backend):
    x = torch.ones(4, 200)

    def mask(members=(0, 0, 0, 0), samples=None, key=1, evaluation=0):
        return dropout(x, rows(*members), None if samples is None else rows(*samples), 0.5, key, evaluation) > 0

    fixed = mask()
    assert (fixed == fixed[0]).all()  # neither sample nor batch
    assert torch.equal(fixed, mask(evaluation=9))  # nor time
    assert not torch.equal(fixed, mask(key=2))
    assert not torch.equal(mask((0, 1, 2, 3))[0], mask((0, 1, 2, 3))[1])
    fresh = mask(samples=(0, 1, 0, 2))
    assert torch.equal(fresh[0], fresh[2])
    assert not torch.equal(fresh[0], fresh[1])
    assert not torch.equal(fresh, mask(samples=(0, 1, 0, 2), evaluation=1))
    assert not torch.equal(fresh[0], fixed[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_rate_scale_and_layout(backend):
    x = torch.randn(8, 64, 32)
    out = dropout(x, torch.arange(8), None, 0.1, 3, backend=backend)
    rate = (out == 0).double().mean().item()
    assert abs(rate - 0.1) < 5 * (0.09 / x.numel()) ** 0.5
    assert relative_error(out[out != 0], x[out != 0] / 0.9) < 1e-6
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(dropout(strided, torch.arange(8), None, 0.1, 3, backend=backend), out)
    assert torch.equal(dropout(x, torch.arange(8), None, 0.0, 3, backend=backend), x)
    assert (dropout(x, torch.arange(8), None, 1.0, 3, backend=backend) == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_inf_are_not_dropped(backend):
    for bad in (torch.nan, torch.inf):
        out = dropout(torch.full((1, 64), bad), rows(0), None, 0.5, 1, backend=backend)
        assert out.isnan().sum() + out.isinf().sum() == 64


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_and_opcheck(backend):
    operator = getattr(torch.ops.fastens, "dropout" if backend == "reference" else f"_dropout_{backend}")
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    for samples, evaluation in ((None, 0), (rows(0, 1, 0), 5)):
        arguments = (rows(0, 1, 2), samples, 0.4, 11, evaluation, "silu" if evaluation else "none")
        assert torch.autograd.gradcheck(lambda x, a=arguments: operator.default(x, *a), (x,))
        results = torch.library.opcheck(operator.default, (x.detach().requires_grad_(), *arguments))
        assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: dropout(torch.ones(2, 3), rows(0, 1), None, 1.5, 0), ValueError, "p is 1.5"),
        (lambda: dropout(torch.ones(2, 3), rows(0), None, 0.5, 0), ValueError, "one number for each row"),
        (lambda: dropout(torch.ones(2, 3), rows(0, 1), rows(0), 0.5, 0), ValueError, "samples"),
        (
            lambda: dropout(torch.ones(2, 3), rows(0, 1), None, 0.5, 0, activation="relu"),
            ValueError,
            "'relu' is unknown",
        ),
        (lambda: dropout(torch.ones(2, 3).long(), rows(0, 1), None, 0.5, 0), TypeError, "floating-point"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
