"""Every kernel on a GPU against the reference on the CPU; what compute-sanitizer runs."""

import pytest
import torch

from fastens.ops import all_ops
from fastens.ops.group_norm import group_norm
from fastens.ops.layer_norm import layer_norm
from fastens.ops.linear import linear
from tests.ops.cases import COUNTS, DTYPES, SHAPES, reduction_cases
from tests.tolerances import OP, relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
OPS = all_ops()


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_members", COUNTS)
def test_reductions(backend, dtype, num_members):
    for case in reduction_cases(num_members):
        run = getattr(torch.ops.fastens, OPS[case.op].kernels[backend]).default
        for shape in SHAPES:
            scores = [torch.randn(shape).to(dtype) for _ in range(num_members)]
            for on_gpu in ([x.cuda() for x in scores], list(torch.stack(scores).cuda().unbind(0))):
                actual = run(on_gpu, *case.arguments).cpu()
                assert relative_error(actual, case.reference([x.double() for x in scores])) <= OP[dtype], case


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_member_ops(dtype):
    x, w = torch.randn(6, 32, 40, 40), torch.randn(3, 32)
    s = torch.randn(6, 32)
    calls = [
        (group_norm, (form(x), 8, w, w, 1e-5, None, s, s, "silu"))
        for form in (torch.Tensor.contiguous, lambda x: x.contiguous(memory_format=torch.channels_last))
    ]
    calls.append((layer_norm, (torch.randn(6, 5, 32), (32,), w, w, 1e-5, None, s, s, "silu")))
    calls += [
        (linear, (torch.randn(rows, 64), torch.randn(3, 96, 64) / 8, torch.randn(3, 96), None, "gelu"))
        for rows in (3, 48, 600)
    ]
    for op, arguments in calls:
        given = [t.to(dtype) if isinstance(t, torch.Tensor) else t for t in arguments]
        expected = op(*(t.double() if isinstance(t, torch.Tensor) else t for t in given), backend="reference")
        on_gpu = [t.cuda() if isinstance(t, torch.Tensor) else t for t in given]
        assert relative_error(op(*on_gpu, backend="triton").cpu(), expected) <= OP[dtype], op.__name__
