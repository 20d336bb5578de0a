"""What the launches of a plan call: one kernel each, which writes where it is told and gives the reference's result."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import fastens
from fastens.engine import planned
from fastens.ops.group_moments import group_moments
from fastens.plan.gpu import calls
from fastens.plan.torch_call import call
from fastens.program.block import Prologue
from fastens.program.steps import Opcode
from tests.fold.test_plans import members_of
from tests.ops.cases import needs_triton
from tests.tolerances import OP, relative_error

pytestmark = needs_triton
NO_KERNEL = ("empty", "new_empty", "empty_like", "empty_strided", "detach", "is_pinned", "promote_types")


class Kernels(TorchDispatchMode):
    """Counts what would be launched on a GPU: Triton's kernels, and operations of torch that are no views."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.names = []
        from triton.runtime.interpreter import InterpretedFunction

        run = InterpretedFunction.run

        def counted(kernel, *args, **kwargs):
            self.names.append(kernel.fn.__name__)
            with _disable_current_modes():
                return run(kernel, *args, **kwargs)

        monkeypatch.setattr(InterpretedFunction, "run", counted)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not view and name not in NO_KERNEL:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def last(*shape, dtype=torch.float16):
    """Images [R, C, H, W] in memory of a plan, their channels last."""
    rows, channels, height, width = shape
    return torch.randn(rows, height, width, channels).to(dtype).movedim(-1, 1)


def within(*shape, dtype=torch.float16):
    """A place for images: channels of wider ones, full of NaN."""
    rows, channels, height, width = shape
    return torch.full((rows, height, width, channels + 8), torch.nan, dtype=dtype).movedim(-1, 1)[:, 4:-4]


def norm_of(x, groups, skip=None, skip_groups=0, norm_groups=0):
    rows, channels = x.shape[0], x.shape[1] + (0 if skip is None else skip.shape[1])
    affine = (torch.randn(3, channels).to(x.dtype) for _ in "wb")
    scale = torch.randn(rows, channels).to(x.dtype)
    norm = Prologue(group_moments(x.float(), groups), *affine, 1e-3, scale, activation="silu")
    if skip is None:
        return norm
    return norm._replace(skip=skip, skip_moments=group_moments(skip.float(), skip_groups), norm_groups=norm_groups)


def launches(device="cpu"):
    """Name -> what is called with a place and a backend, and the place."""
    torch.manual_seed(0)
    with torch.device(device):
        return launches_here()


def launches_here():
    """The launches, on the device that is the default."""
    x, skip = last(6, 16, 4, 5), last(6, 8, 4, 5)
    norm, norm_of_both, silu = norm_of(x, 8), norm_of(x, 8, skip, 4, 3), Prologue(activation="silu")
    gelu = norm._replace(activation="gelu")
    weight, bias = torch.randn(3, 10, 16, 1, 1).half(), torch.randn(3, 10).half()
    q, k, v = torch.randn(6, 20, 3, 2, 8).half().permute(2, 0, 3, 1, 4)
    tokens, stack, row = torch.randn(6, 7, 24).half(), torch.randn(3, 24).half(), torch.randn(6, 16, 1, 1).half()
    chain = [(Opcode.MULTIPLY, 0, 1, 0.0), (Opcode.SILU, 2, 0, 0.0), (Opcode.ADD, 3, 0, 0.0)]
    copy = [(Opcode.COPY, 0, 0, 0.0)]
    pool = torch.ops.aten.avg_pool2d.default
    places = torch.full((6, 7, 30), torch.nan).half()[:, :, 3:27]
    heads = torch.full((6, 20, 2, 8), torch.nan).half().movedim(2, 1)
    return {
        "moments": (lambda out, b: calls.moments(out, x, 4, b), torch.full((6, 4, 1, 2), torch.nan)),
        "group norm": (lambda out, b: calls.group_norm(out, x, norm, None, b), within(6, 16, 4, 5)),
        "group norm, gelu": (
            lambda out, b: calls.group_norm(out, x, gelu, None, b),
            within(6, 16, 4, 5),
        ),
        "group norm of two": (lambda out, b: calls.group_norm(out, x, norm_of_both, None, b), within(6, 24, 4, 5)),
        "activation": (
            lambda out, b: calls.group_norm(out, x, silu, None, b),
            within(6, 16, 4, 5),
        ),
        "linear": (lambda out, b: calls.linear(out, x, weight, bias, "gelu", b), within(6, 10, 4, 5)),
        "layer norm": (lambda out, b: calls.layer_norm(out, tokens, stack, stack, 1e-3, b), places),
        "attention": (lambda out, b: calls.attention(out, q, k, v, 0.3, b), heads),
        "join": (lambda out, b: calls.join(out, [x, skip], 1, b), within(6, 24, 4, 5)),
        "join, enlarged": (lambda out, b: calls.join(out, [x, skip], 2, b), within(6, 24, 8, 10)),
        "pointwise": (lambda out, b: calls.pointwise(out, [x, row.expand_as(x)], chain, b), within(6, 16, 4, 5)),
        "copy": (lambda out, b: calls.pointwise(out, [x], copy, b), within(6, 16, 4, 5)),
        "pool": (
            lambda out, b: call([out], pool, (x, [2, 2]), {}),
            torch.full_like(last(6, 16, 2, 2), torch.nan),
        ),
    }


@pytest.mark.parametrize("name", launches())
def test_one_kernel_and_no_copy(name, monkeypatch):
    run, out = launches()[name]
    expected = torch.empty_like(out)
    run(expected, "reference")
    run(out, "triton")  # what is kept from call to call is made
    with Kernels(monkeypatch) as kernels:
        run(out, "triton")
    assert len(kernels.names) == 1, kernels.names
    assert relative_error(out, expected) <= 2 * OP[torch.float16]  # both are rounded


def test_pooling_has_one_reference():
    run, out = launches()["pool"]
    run(out, "triton")
    torch.manual_seed(0)
    assert relative_error(out, F.avg_pool2d(last(6, 16, 4, 5).float(), 2)) <= OP[torch.float16]


def test_a_whole_plan_has_no_hidden_kernels(monkeypatch):
    """Of a transformer in float16: its launches, a copy of its input and one of its output."""
    monkeypatch.setattr(planned, "launches_on", lambda _: True)
    members, arguments = members_of("transformer", 2)
    members = [member.half() for member in members]
    x = arguments(2)[0][0].half()
    ensemble = fastens.Ensemble(members, engine="fold", backend="triton")
    with torch.no_grad():
        expected = torch.stack([member.float()(x.float()) for member in members])
        actual = ensemble.member_outputs(x)
    (plan,) = [entry.plan for entry in ensemble._engine.plans.entries]
    assert {"attention", "linear", "linear group", "layer norm"} <= set(plan.kinds)
    assert relative_error(actual, expected) <= 2 * OP[torch.float16]  # eight layers
    with Kernels(monkeypatch) as kernels:
        plan.run([x])
    others = [name for name in kernels.names if not name.endswith("_kernel")]
    assert others == ["copy_", "copy_"]
    assert len(kernels.names) == sum(plan.kinds.values()) + 2


def test_the_count_counts(monkeypatch):
    x = torch.randn(6, 4)
    with Kernels(monkeypatch) as kernels:
        (x.t() + 1).copy_(x.t())
        x[:2].expand(3, 2, 4)
    assert kernels.names == ["add", "copy_"]


def test_many_vectors_of_many_features_are_the_librarys(monkeypatch):
    """As on a GPU: a matrix product, and one pass for the bias and the activation."""
    torch.manual_seed(0)
    monkeypatch.setattr(calls, "LIBRARY_INPUTS", 8)
    monkeypatch.setattr(calls.linear_op, "FUSED_ROWS", 4)
    for bias in (torch.randn(3, 10), None):
        x, weight = last(6, 16, 4, 5, dtype=torch.float32), torch.randn(3, 10, 16, 1, 1)
        out, expected = within(6, 10, 4, 5, dtype=torch.float32), torch.empty(6, 10, 4, 5)
        calls.linear(expected, x, weight, bias, "silu", "reference")
        with Kernels(monkeypatch) as kernels:
            calls.linear(out, x, weight, bias, "silu", "triton")
        assert kernels.names == ["bmm", "pointwise_kernel"]
        assert relative_error(out, expected) <= OP[torch.float32]


def test_places_that_a_kernel_cannot_write():
    """Pixels that are not equally far apart are written by way of a copy."""
    torch.manual_seed(0)
    x, weight = last(6, 16, 4, 5), torch.randn(3, 10, 16, 1, 1).half()
    norm = norm_of(x, 8)
    for run, channels in (
        (lambda out, b: calls.linear(out, x, weight, None, "none", b), 10),
        (lambda out, b: calls.group_norm(out, x, norm, None, b), 16),
    ):
        padded = torch.full((6, 6, 7, channels), torch.nan).movedim(-1, 1)
        out, expected = padded[:, :, 1:-1, 1:-1], torch.empty(6, channels, 4, 5)
        run(expected, "reference")
        run(out, "triton")
        assert relative_error(out, expected) <= OP[torch.float16]
        assert int((~padded.isnan()).sum()) == out.numel()


@pytest.mark.parametrize(("width", "dtype"), [(8, torch.float32), (264, torch.float16)])
def test_attention_that_the_kernel_does_not_take(width, dtype):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 1, 5, width).to(dtype) for _ in "qkv")
    out = torch.empty_like(q)
    calls.attention(out, q, k, v, 0.1, "triton")
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=0.1)
    assert relative_error(out, expected) <= OP[dtype]


def test_operations_without_a_place_to_write_are_copied():
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    out = torch.full((6, 4), torch.nan).t()  # dense, but not as the operation lays its result out
    call([out[:, ::2]], torch.ops.aten.cumsum.default, (x[:, ::2], 1), {})
    assert torch.equal(out[:, ::2], x[:, ::2].cumsum(1))
    assert out[:, 1::2].isnan().all()
    values, numbers = torch.empty(4, 2), torch.empty(4, 2, dtype=torch.int64)
    call([values, numbers], torch.ops.aten.topk.default, (x, 2), {})
    assert torch.equal(values, x.topk(2).values)
    assert torch.equal(numbers, x.topk(2).indices)
    kept = x.clone()
    changed = torch.empty_like(x)
    call([changed], torch.ops.aten.add_.Tensor, (x, 1), {})
    assert torch.equal(changed, kept + 1)
    assert torch.equal(x, kept)
