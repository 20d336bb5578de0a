"""The ops that reduce over members: every rule and the variance, every backend, against the reference."""

import pytest
import torch

from fastens import _native
from fastens.ops import all_ops
from tests.ops.cases import COUNTS, DTYPES, reduction_cases
from tests.tolerances import OP, relative_error

OPS = all_ops()
CASES = [str(case) for case in reduction_cases(2)]
needs_native = pytest.mark.skipif(not _native.load(), reason=f"no compiled library: {_native.status()}")


def case_of(name, num_members):
    return next(case for case in reduction_cases(num_members) if str(case) == name)


def kernel(case, backend):
    op = OPS[case.op]
    return op.default if backend == "reference" else getattr(torch.ops.fastens, op.kernels[backend]).default


def poisoned_and_equal(call, expected, tolerance):
    """Compare twice, with memory that was NaN before, so that an element left unwritten shows."""
    for _ in range(2):
        garbage = [torch.full_like(expected, torch.nan) for _ in range(3)]
        del garbage
        actual = call()
        assert actual.dtype == expected.dtype
        assert torch.equal(actual.isnan(), expected.isnan())
        assert relative_error(actual.nan_to_num(), expected.nan_to_num()) <= tolerance


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_native_equals_reference(name, dtype):
    generator = torch.Generator().manual_seed(0)
    for num_members in COUNTS:
        case = case_of(name, num_members)
        for shape in ((3, 5), (1,), (2, 3, 7, 37), (4, 1300)):
            scores = [torch.randn(shape, generator=generator).to(dtype) for _ in range(num_members)]
            poisoned_and_equal(
                lambda case=case, scores=scores: kernel(case, "native")(scores, *case.arguments),
                case.reference(scores),
                OP[dtype],
            )


@needs_native
@pytest.mark.parametrize("name", CASES)
def test_layouts(name):
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
        actual = kernel(case, "native")(list(scores), *case.arguments)
        assert relative_error(actual, expected) <= OP[torch.float32], layout
        assert all(torch.equal(a, b) for a, b in zip(scores, before, strict=True))
        assert all(actual.data_ptr() != x.data_ptr() for x in scores)
    kept = kernel(case, "native")(layouts["channels_last"], *case.arguments)
    assert kept.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_reach_the_output(backend, name, bad):
    case = case_of(name, 5)
    for k in range(5):
        scores = [torch.randn(2, 3, 9) for _ in range(5)]
        scores[k][1, 1, 4] = bad
        expected = case.reference([x.double() for x in scores])
        actual = kernel(case, backend)(scores, *case.arguments)
        assert torch.equal(actual.isnan(), expected.isnan())
        assert torch.equal(actual.isinf(), expected.isinf())
        if bad != bad and "alternating" not in name:
            assert actual[1, 1, 4].isnan()


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
@pytest.mark.parametrize("name", CASES)
def test_ties_and_signed_zeros(backend, name):
    case = case_of(name, 4)
    values = torch.tensor([-2.0, -0.0, 0.0, 1.0, 2.0])
    scores = [values[torch.randint(5, (3, 64), generator=torch.Generator().manual_seed(k))] for k in range(4)]
    expected = case.reference([x.double() for x in scores])
    assert relative_error(kernel(case, backend)(scores, *case.arguments), expected) <= OP[torch.float32]


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0), (0,)])
def test_empty_batch(backend, name, shape):
    case = case_of(name, 3)
    assert kernel(case, backend)([torch.empty(shape)] * 3, *case.arguments).shape == shape


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
@pytest.mark.parametrize("name", CASES)
def test_opcheck(backend, name):
    case = case_of(name, 3)
    for grad in (False, True):
        scores = [torch.randn(2, 3, 4, 4, requires_grad=grad) for _ in range(3)]
        results = torch.library.opcheck(kernel(case, backend), (scores, *case.arguments))
        assert set(results.values()) == {"SUCCESS"}
    scores = [x.detach().contiguous(memory_format=torch.channels_last) for x in scores]
    assert set(torch.library.opcheck(kernel(case, backend), (scores, *case.arguments)).values()) == {"SUCCESS"}


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
@pytest.mark.parametrize("name", CASES)
def test_gradients(backend, name):
    case = case_of(name, 3)
    # distinct values, so that no order changes within the step of the check
    values = torch.randperm(3 * 2 * 5, generator=torch.Generator().manual_seed(1)).double().reshape(3, 2, 5) / 10 - 1.43
    scores = [x.clone().requires_grad_() for x in values]

    def call(*scores):
        return kernel(case, backend)(list(scores), *case.arguments)

    assert torch.autograd.gradcheck(call, scores)
    assert torch.autograd.gradgradcheck(call, scores)
    twice = torch.autograd.grad(call(scores[0], scores[0], scores[1]).sum(), scores[0])[0]
    copies = [scores[0].detach().clone().requires_grad_() for _ in range(2)]
    apart = torch.autograd.grad(call(*copies, scores[1]).sum(), copies)
    assert relative_error(twice, apart[0] + apart[1]) < 1e-12


@needs_native
@pytest.mark.parametrize("name", CASES)
def test_vmap(name):
    case = case_of(name, 3)
    stack = torch.randn(4, 3, 2, 5)
    mapped = torch.vmap(lambda x: kernel(case, "native")(list(x.unbind(0)), *case.arguments))(stack)
    apart = torch.stack([case.reference(x) for x in stack])
    assert relative_error(mapped, apart) <= OP[torch.float32]


@pytest.mark.parametrize("name", [case for case in CASES if "aggregate" in case])
def test_compiles_whole(name):
    case = case_of(name, 5)
    scores = [torch.randn(3, 2, 4) for _ in range(5)]
    torch.compiler.reset()
    operator = kernel(case, "native" if _native.load() else "reference")
    compiled = torch.compile(lambda scores: operator(scores, *case.arguments) + 1, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(scores), case.reference(scores) + 1) <= OP[torch.float32]
