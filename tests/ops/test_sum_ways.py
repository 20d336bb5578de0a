"""Ways of a convolution that is summed over members: all that take it agree, and the fastest is measured."""

import pytest
import torch

from fastens.ops import conv2d_sum as op
from fastens.ops._sum_ways import CHOICE, Sum
from fastens.ops._table import Table
from fastens.ops.group_moments import group_moments
from fastens.plan import calls
from tests.ops.cases import needs_triton
from tests.tolerances import OP, relative_error

pytestmark = needs_triton
K, B, C, SIZE = 3, 2, 16, (5, 4)


def arguments(before, dtype=torch.float32):
    """Of the ways: K members, a norm of four groups with maps by row, an activation alone, or nothing before."""
    torch.manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, dtype=torch.double).to(dtype)

    x = (2 * normal(K * B, C, *SIZE) + 1).contiguous(memory_format=torch.channels_last)
    weight, bias = normal(K, 3, 3, 3, C).movedim(-1, 2) / (3 * C**0.5), normal(K, 3)
    given = [x, weight, bias, [0.7, -0.2, 0.3], (1, 1), (1, 1)]
    if before == "norm":
        moments = group_moments(x, 4, backend="reference")
        given += [moments, normal(K, C), normal(K, C), 1e-3, normal(K * B, C), normal(K * B, C), "silu"]
    elif before == "activation":
        given += [None, None, None, 1e-5, None, None, "silu"]
    return Sum(*given)


def in_double(call):
    return [x.double() if isinstance(x, torch.Tensor) else x for x in call]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("before", ["norm", "activation", "nothing"])
def test_all_ways_agree(before, dtype):
    call = arguments(before, dtype)
    double = Sum(*in_double(call))
    names = Sum._fields[6:]
    expected = op.conv2d_sum(*double[:6], **dict(zip(names, double[6:], strict=True)), backend="reference")
    taken = [name for name, way in CHOICE.ways.items() if way.refuses(*call) is None]
    assert taken == (["triton"] if before == "nothing" else ["triton", "triton apart"])
    for name in taken:
        assert relative_error(CHOICE.ways[name].run(*call), expected) <= OP[dtype], name


@torch.no_grad()
def test_the_plan_takes_the_way_that_measures_best(tmp_path, monkeypatch):
    call = arguments("norm")
    seconds = {"fused": 2e-3, "apart": 1e-3}
    monkeypatch.setattr(CHOICE, "table", Table(tmp_path / "choices.json"))
    monkeypatch.setattr(CHOICE, "devices", ("cpu",))
    monkeypatch.setattr(CHOICE, "clock", lambda run, device: lambda: seconds[run.func.__name__])
    monkeypatch.setattr(CHOICE, "_known", {})
    assert CHOICE.choose(call, torch.device("cpu")) == "triton apart"
    found = CHOICE.table.find("cpu", "conv2d_sum", CHOICE.key(*call))
    assert set(found["seconds"]) == {"triton", "triton apart"}
    assert not found["failed"]


def test_a_key_tells_calls_apart():
    call = arguments("norm")
    others = [
        arguments("norm", torch.bfloat16), arguments("activation"), arguments("nothing"),
        call._replace(scale=None, shift=None), call._replace(activation="none"), call._replace(x=call.x[:, :, :4]),
        call._replace(weight=call.weight[:, :2]), call._replace(weight=call.weight.contiguous()),
        call._replace(padding=(0, 0)),
    ]  # fmt: skip
    keys = [CHOICE.key(*each) for each in (call, *others)]
    assert len(set(keys)) == len(keys)
    assert CHOICE.key(*call._replace(member_weights=[1.0, 2.0, 3.0])) == keys[0]


def test_a_plan_on_a_cpu_measures_nothing(monkeypatch):
    monkeypatch.setattr(CHOICE, "choose", lambda *_: pytest.fail("measured"))
    call = arguments("norm")
    given = dict(zip(Sum._fields[6:], call[6:], strict=True))
    found = calls.conv2d_sum(call.member_weights, *call[:3], *call[4:6], backend="reference", **given)
    expected = op.conv2d_sum(*call[:6], **given, backend="reference")
    assert torch.equal(found, expected)
