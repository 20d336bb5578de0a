"""The ops that reduce over members: every rule and the variance, every backend, against the reference."""

import pytest
import torch

from fastens.ops import all_ops
from tests.ops.cases import BACKENDS, COUNTS, DTYPES, FEW, KERNELS, SHAPES, reduction_cases
from tests.tolerances import OP, relative_error

OPS = all_ops()
CASES = [str(case) for case in reduction_cases(2)]


def case_of(name, num_members):
    return next(case for case in reduction_cases(num_members) if str(case) == name)


def kernel(case, backend):
    op = OPS[case.op]
    return op.default if backend == "reference" else getattr(torch.ops.fastens, op.kernels[backend]).default


def poisoned_and_equal(call, expected, tolerance, times=2):
    """Compare, by default twice, with memory that was NaN before, so that an element left unwritten shows."""
    for _ in range(times):
        garbage = [torch.full_like(expected, torch.nan) for _ in range(3)]
        del garbage
        actual = call()
        assert actual.dtype == expected.dtype
        assert torch.equal(actual.isnan(), expected.isnan())
        assert relative_error(actual.nan_to_num(), expected.nan_to_num()) <= tolerance


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_kernel_equals_reference(name, dtype, backend):
    generator = torch.Generator().manual_seed(0)
    counts, shapes = (COUNTS, SHAPES) if backend == "native" else FEW[dtype]
    for num_members in counts:
        case = case_of(name, num_members)
        for shape in shapes:
            scores = [torch.randn(shape, generator=generator).to(dtype) for _ in range(num_members)]
            poisoned_and_equal(
                lambda case=case, scores=scores: kernel(case, backend)(scores, *case.arguments),
                case.reference(scores),
                OP[dtype],
                1 if backend == "triton" else 2,
            )


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", CASES)
def test_layouts(name, backend):
    case = case_of(name, 3)
    stack = torch.randn(3, 4, 6, 5, 2)
    layouts = {
        "channels_last": [x.contiguous(memory_format=torch.channels_last) for x in stack],
        "mixed": [stack[0], stack[1].contiguous(memory_format=torch.channels_last), stack[2]],
        "strided": list(torch.randn(3, 4, 12, 5, 2)[:, :, ::2]),
        "batch inside": [x.transpose(0, -1).contiguous().transpose(0, -1) for x in stack],
        "expanded": [x[:1].expand(4, 6, 5, 2) for x in stack],
        "unbound": stack.unbind(0),
    }
    for layout, scores in layouts.items():
        before = [x.clone() for x in scores]
        expected = case.reference([x.contiguous() for x in scores])
        actual = kernel(case, backend)(list(scores), *case.arguments)
        assert relative_error(actual, expected) <= OP[torch.float32], layout
        assert all(torch.equal(a, b) for a, b in zip(scores, before, strict=True))
        assert all(actual.data_ptr() != x.data_ptr() for x in scores)
    kept = kernel(case, backend)(layouts["channels_last"], *case.arguments)
    assert kept.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_reach_the_output(backend, name, bad):
    case = case_of(name, 5)
    for k in range(0, 5, 4 if backend == "triton" else 1):
        scores = [torch.randn(2, 3, 9) for _ in range(5)]
        scores[k][1, 1, 4] = bad
        expected = case.reference([x.double() for x in scores])
        actual = kernel(case, backend)(scores, *case.arguments)
        assert torch.equal(actual.isnan(), expected.isnan())
        assert torch.equal(actual.isinf(), expected.isinf())
        if bad != bad and "alternating" not in name:
            assert actual[1, 1, 4].isnan()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_ties_and_signed_zeros(backend, name):
    case = case_of(name, 4)
    values = torch.tensor([-2.0, -0.0, 0.0, 1.0, 2.0])
    scores = [values[torch.randint(5, (3, 64), generator=torch.Generator().manual_seed(k))] for k in range(4)]
    expected = case.reference([x.double() for x in scores])
    assert relative_error(kernel(case, backend)(scores, *case.arguments), expected) <= OP[torch.float32]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0), (0,)])
def test_empty_batch(backend, name, shape):
    case = case_of(name, 3)
    assert kernel(case, backend)([torch.empty(shape)] * 3, *case.arguments).shape == shape


@pytest.mark.covering(1)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_opcheck(backend, name):
    case = case_of(name, 3)
    for grad in (True,) if backend == "triton" else (False, True):
        scores = [torch.randn(2, 3, 4, 4, requires_grad=grad) for _ in range(3)]
        results = torch.library.opcheck(kernel(case, backend), (scores, *case.arguments))
        assert set(results.values()) == {"SUCCESS"}
    scores = [x.detach().contiguous(memory_format=torch.channels_last) for x in scores]
    assert set(torch.library.opcheck(kernel(case, backend), (scores, *case.arguments)).values()) == {"SUCCESS"}


@pytest.mark.covering(1)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_gradients(backend, name):
    case = case_of(name, 3)
    # distinct values, so that no order changes within the step of the check
    values = torch.randperm(3 * 2 * 5, generator=torch.Generator().manual_seed(1)).double().reshape(3, 2, 5) / 10 - 1.43
    scores = [x.clone().requires_grad_() for x in values]

    def call(*scores):
        return kernel(case, backend)(list(scores), *case.arguments)

    few = backend == "triton"  # random directions in place of every element: the interpreter is slow
    assert torch.autograd.gradcheck(call, scores, fast_mode=few)
    assert torch.autograd.gradgradcheck(call, scores, fast_mode=few)
    twice = torch.autograd.grad(call(scores[0], scores[0], scores[1]).sum(), scores[0])[0]
    copies = [scores[0].detach().clone().requires_grad_() for _ in range(2)]
    apart = torch.autograd.grad(call(*copies, scores[1]).sum(), copies)
    assert relative_error(twice, apart[0] + apart[1]) < 1e-12


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", CASES)
def test_vmap(name, backend):
    case = case_of(name, 3)
    stack = torch.randn(4, 3, 2, 5)
    mapped = torch.vmap(lambda x: kernel(case, backend)(list(x.unbind(0)), *case.arguments))(stack)
    apart = torch.stack([case.reference(x) for x in stack])
    assert relative_error(mapped, apart) <= OP[torch.float32]


@pytest.mark.covering(1)
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", [case for case in CASES if "aggregate" in case])
def test_compiles_whole(name, backend):
    case = case_of(name, 5)
    scores = [torch.randn(3, 2, 4) for _ in range(5)]
    torch.compiler.reset()
    operator = kernel(case, backend)
    compiled = torch.compile(lambda scores: operator(scores, *case.arguments) + 1, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(scores), case.reference(scores) + 1) <= OP[torch.float32]
