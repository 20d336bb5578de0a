"""The arithmetic of the CUDA kernels, compiled for the host by g++, against the reference; launches need a GPU."""

import ctypes

import pytest
import torch

from fastens import rules
from fastens.reference.aggregate_update import aggregate_update
from fastens.reference.dropout import dropout
from tests.tolerances import OP, relative_error

CASES = {  # rule -> its number in csrc/cuda/job.h, average, absolute, scale
    rules.Mean(): (1, True, False, None),
    rules.Sum(): (1, True, False, 1.0),
    rules.Median(): (2, True, False, 1.0),
    rules.Median("lower"): (2, False, False, 1.0),
    rules.Dominant(): (3, True, False, 1.0),
    rules.MaxAbs(): (3, True, True, 1.0),
    rules.Geometric(): (4, True, False, 1.0),
    rules.Alternating(): (5, True, False, 1.0),
}


def pointer(tensor):
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


@pytest.mark.covering(1)
@pytest.mark.parametrize("everything", [False, True], ids=["plain", "guided update with variance"])
@pytest.mark.parametrize("rule", CASES, ids=repr)
def test_equals_reference(library, rule, everything):
    torch.manual_seed(0)
    number, average, absolute, scale = CASES[rule]
    batch, length = 3, 8
    for num_members in (*range(1, 17), 17, 33):
        scores = torch.randn(num_members, 2 * batch if everything else batch, length)
        if num_members == 5:
            scores[2, 1, 3] = torch.nan
        x, noise, c, g = (torch.randn(s) for s in ((batch, length), (batch, length), (3, batch), (batch,)))
        given = (x, noise, c, g) if everything else (None, None, None, None)
        lows = scores.amin((0, 2)).contiguous()
        expected = aggregate_update(
            scores.double(), rule, *(None if t is None else t.double() for t in given), everything, seed=3
        )
        for in_registers in (True, False) if num_members <= 16 else (False,):
            out = torch.full((batch, length), 7.0)
            variance = torch.full_like(scores[0], 7.0) if everything else None
            library("reduce").reduce_on_host(
                number, in_registers, pointer(scores), num_members, ctypes.c_int64(scores.shape[1]),
                ctypes.c_int64(length), average, absolute, ctypes.c_double(scale or 1 / num_members),
                ctypes.c_double(rules.Geometric().eps), pointer(lows), *(pointer(t) for t in given), pointer(out),
                pointer(variance),
            )  # fmt: skip
            for actual, wanted in ((out, expected[0]), (variance, expected[1]))[: 1 + everything]:
                assert torch.equal(actual.isnan(), wanted.isnan())
                assert relative_error(actual.nan_to_num(), wanted.nan_to_num()) <= OP[torch.float32]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dropout_has_the_bits_of_the_reference(library, dtype, channels_last):
    torch.manual_seed(0)
    members, samples = torch.tensor([0, 4, 4]), torch.tensor([5, 0, 2**31])
    for channels, space in ((1, 1), (1, 63), (3, 8), (5, 7), (64, 4)):
        x = torch.randn(3, channels, space, dtype=dtype)
        given = x.movedim(1, -1).contiguous() if channels_last else x.contiguous()
        for numbers, p, key, evaluation, activation in (
            (samples, 0.3, -5, 2**40 + 2**31 + 7, "none"), (None, 0.8, 2**63 - 1, 3, "none"), (None, 0.5, 1, 0, "silu"),
            (samples, 1.0, 2**33, 1, "gelu"), (None, 0.0, 0, 0, "gelu_tanh"),
        ):  # fmt: skip
            expected = dropout(x.double(), members, numbers, p, key, evaluation, activation)
            for packed in (False, True) if not channels_last and space % 4 == 0 else (False,):
                out = torch.full_like(given, torch.nan)
                library("dropout").drop_on_host(
                    dtype == torch.float64, packed, channels_last, pointer(given), pointer(out), pointer(members),
                    pointer(numbers), ctypes.c_int64(3), ctypes.c_int64(channels), ctypes.c_int64(space),
                    ctypes.c_double(p), ctypes.c_uint64(key % 2**64), ctypes.c_uint32(evaluation % 2**32),
                    activation.encode(),
                )  # fmt: skip
                actual = out.movedim(-1, 1) if channels_last else out
                assert torch.equal(actual == 0, expected == 0)
                assert relative_error(actual, expected) <= OP[dtype]
                if activation == "none":
                    assert torch.equal(actual, dropout(x, members, numbers, p, key, evaluation))
