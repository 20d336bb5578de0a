"""Every kernel on a GPU against the reference on the CPU; what compute-sanitizer runs."""

import pytest
import torch
from torch import nn

import fastens
from fastens.ops import all_ops, conv
from fastens.ops._choice import Table
from fastens.ops.dropout import dropout
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


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_has_the_bits_of_the_reference(backend, dtype):
    members, samples = torch.tensor([0, 4, 4]), torch.tensor([5, 0, 2**31])
    for shape in ((3,), (3, 1), (3, 63), (3, 3, 5, 7), (3, 64, 32, 32), (3, 0)):
        x = torch.randn(shape).to(dtype)
        for form in [x] if x.ndim < 4 else [x, x.contiguous(memory_format=torch.channels_last)]:
            for drawn in ((samples, 0.3, -5, 2**33 + 7), (None, 0.8, 2**63 - 1, 0)):
                expected = dropout(form, members, *drawn, activation="silu", backend="reference")
                rest = (members.cuda(), None if drawn[0] is None else samples.cuda(), *drawn[1:])
                actual = dropout(form.cuda(), *rest, activation="silu", backend=backend)
                assert actual.stride() == form.stride()
                assert torch.equal(actual.cpu() == 0, expected == 0)
                assert relative_error(actual.cpu(), expected) <= OP[dtype]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_ways_of_convolution_agree_and_one_is_chosen(layout, tmp_path, monkeypatch):
    monkeypatch.setattr(conv.CHOICE, "table", Table(tmp_path / "choices.json"))
    conv.CHOICE.forget()
    for kernel in (1, 3):
        x = torch.randn(6, 16, 8, 8, device="cuda").contiguous(memory_format=layout)
        w, b = torch.randn(3, 24, 16, kernel, kernel, device="cuda"), torch.randn(3, 24, device="cuda")
        settings = ((1, 1), (kernel // 2,) * 2)
        with torch.no_grad():
            expected = conv.conv(x.double(), w.double(), b.double(), *settings, way="members")
            assert relative_error(conv.conv(x, w, b, *settings), expected) <= OP[torch.bfloat16]  # TF32 may be on
            (entry,) = conv.CHOICE.table.content[torch.cuda.get_device_name()]["conv"].values()
            assert {"members", "grouped"} <= set(entry["seconds"])
            conv.CHOICE.table.content.clear()


def test_capture_replays_a_step_on_another_stream_and_with_fixed_masks():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.SiLU(), nn.Dropout(0.3), nn.Conv2d(32, 3, 1))

        def forward(self, x, t):
            return self.layers(x) * t.reshape(-1, 1, 1, 1)

    torch.manual_seed(0)
    x, t = torch.randn(2, 3, 8, 8, device="cuda"), torch.rand(2)
    for ens in (fastens.Ensemble([Net().eval() for _ in range(3)]), fastens.MCDropout(Net(), 3)):
        ens = ens.cuda()
        with torch.no_grad():
            expected = [ens(x, t.cuda()), ens(2 * x, t.cuda())]
            ens.capture(x, t)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            first = ens(x, t)
            with torch.cuda.stream(stream):
                second = ens(2 * x, t)
            stream.synchronize()
            for actual, wanted in zip((first, second), expected, strict=True):
                assert relative_error(actual, wanted) <= OP[torch.bfloat16]
