"""How far results may be apart, relative to the largest expected magnitude, with the reason for each number."""

import torch

# One op against its reference: the same few operations in another order.
OP = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 2e-2,  # 8 bits of mantissa, rounded after one reduction in float32
    torch.float16: 2e-3,  # 11 bits
}
# A whole network, some hundred layers, against the members one by one.
NETWORK = {torch.float64: 1e-12, torch.float32: 1e-5}


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape
    if expected.numel() == 0:
        return 0.0
    difference = (actual.double() - expected.double()).abs().max()
    return float((difference / expected.double().abs().max().clamp_min(1e-30)).detach())
