"""The tolerance of the fold against the loop, by the precision of a GPU's float32 products."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastens.engine.check import TOLERANCE, TOLERANCE_TF32, tolerance_for


@pytest.mark.parametrize(
    ("conv", "matmul", "tolerance"),
    [
        ("ieee", "ieee", TOLERANCE[torch.float32]),
        ("tf32", "ieee", TOLERANCE_TF32),
        ("ieee", "tf32", TOLERANCE_TF32),
    ],
)
def test_precisions_that_are_set_by_their_newer_names(conv, matmul, tolerance):
    """torch's older names, allow_tf32, raise where these differ."""
    backends = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [backend.fp32_precision for backend in backends]
    on_gpu = SimpleNamespace(is_cuda=True, dtype=torch.float32)
    try:
        for backend, precision in zip(backends, (conv, matmul), strict=True):
            backend.fp32_precision = precision
        assert tolerance_for(on_gpu, nn.Linear(2, 2).parameters()) == tolerance
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
