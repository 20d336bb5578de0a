"""Ways of a convolution that is summed over members: all that take it agree, and the fastest is measured."""

import pytest
import torch

from fastens.ops import conv2d_sum as op
from fastens.ops._sum_ways import CHOICE
from fastens.ops._table import Table
from fastens.ops.group_moments import group_moments
from fastens.plan.gpu import calls
from fastens.program.block import ConvBlock
from tests.ops.cases import needs_triton
from tests.ops.convolutions import in_double
from tests.tolerances import OP, relative_error

pytestmark = needs_triton
K, B, C, SIZE = 3, 2, 16, (5, 4)
WEIGHTS = [0.7, -0.2, 0.3]


def arguments(before, dtype=torch.float32):
    """K members, a norm of four groups with maps by row, an activation alone, or nothing before."""
    torch.manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, dtype=torch.double).to(dtype)

    x = (2 * normal(K * B, C, *SIZE) + 1).contiguous(memory_format=torch.channels_last)
    weight, bias = normal(K, 3, 3, 3, C).movedim(-1, 2) / (3 * C**0.5), normal(K, 3)
    around = {"activation": "none" if before == "nothing" else "silu"}
    if before == "norm":
        around |= {
            "moments": group_moments(x, 4, backend="reference"), "norm_weight": normal(K, C),
            "norm_bias": normal(K, C), "eps": 1e-3, "scale": normal(K * B, C), "shift": normal(K * B, C),
        }  # fmt: skip
    return ConvBlock.of(x, weight, bias, (1, 1), (1, 1), **around)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("before", ["norm", "activation", "nothing"])
def test_all_ways_agree(before, dtype):
    call = (arguments(before, dtype), WEIGHTS)
    expected = op.conv2d_sum(ConvBlock.from_flat(in_double(call[0].flat())), WEIGHTS, "reference")
    taken = [name for name, way in CHOICE.ways.items() if way.refuses(*call) is None]
    assert taken == (["triton"] if before == "nothing" else ["triton", "triton apart"])
    for name in taken:
        assert relative_error(CHOICE.ways[name].run(*call), expected) <= OP[dtype], name


@torch.no_grad()
def test_the_plan_takes_the_way_that_measures_best(tmp_path, monkeypatch):
    call = (arguments("norm"), WEIGHTS)
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
    block = arguments("norm")
    others = [
        arguments("norm", torch.bfloat16), arguments("activation"), arguments("nothing"),
        block.replace(scale=None, shift=None), block.replace(activation="none"), block.replace(x=block.x[:, :, :4]),
        block.replace(weight=block.weight[:, :2]), block.replace(weight=block.weight.contiguous()),
        block.replace(padding=(0, 0)),
    ]  # fmt: skip
    keys = [CHOICE.key(each, WEIGHTS) for each in (block, *others)]
    assert len(set(keys)) == len(keys)
    assert CHOICE.key(block, [1.0, 2.0, 3.0]) == keys[0]


def test_a_plan_on_a_cpu_measures_nothing(monkeypatch):
    monkeypatch.setattr(CHOICE, "choose", lambda *_: pytest.fail("measured"))
    block = arguments("norm")
    assert torch.equal(calls.conv2d_sum(WEIGHTS, block, "reference"), op.conv2d_sum(block, WEIGHTS, "reference"))
