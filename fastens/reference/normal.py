"""Counter-based Gaussian noise, in PyTorch arithmetic: each sample has its own stream."""

import math

import torch
from torch import Tensor

from fastens.reference._philox import philox

_MASK = 0xFFFFFFFF
_DOMAIN = 0x6E6F726D616C0000  # sets the key apart from that of the member draws, which count differently


def normal(seed: int | Tensor, offset: int | Tensor, samples: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Draw standard normal noise for numbered samples.

    Element j of sample i is a function of (seed, offset, i, j) alone: not of its batch-mates, the batch size or the
    device, up to the device's rounding of logarithm and cosine. Philox4x32-10 with counter ``(j // 4, offset, i)``, and
    Box and Muller's transform of its four words.

    Args:
        seed: 64 bits; or int64 [] that holds them, so that a recorded graph can read others.
        offset: which draw of a sample this is, e.g. the sampler's step, 32 bits; one, or one per sample, int64 [B].
        samples: numbers of the samples, int64 [B], none negative.
        shape: of one sample.

    Returns:
        float32 [B, *shape] on the device of ``samples``.
    """
    numel = math.prod(shape)
    block = torch.arange(-(-numel // 4), dtype=torch.int64, device=samples.device)
    index = samples.reshape(-1, 1)
    draw = torch.as_tensor(offset, device=samples.device).expand(len(samples)).reshape(-1, 1) & _MASK
    counter = (block, draw, index & _MASK, index >> 32)
    words = philox(counter, seed ^ _DOMAIN if isinstance(seed, Tensor) else (seed ^ _DOMAIN) & 0xFFFFFFFFFFFFFFFF)
    uniform = [(word.double() + 0.5) / 2**32 for word in words]  # in (0, 1), so that the logarithm is finite
    pairs = []
    for radius, angle in (uniform[:2], uniform[2:]):
        length, turn = (-2 * radius.log()).sqrt(), 2 * math.pi * angle
        pairs += [length * turn.cos(), length * turn.sin()]
    drawn = torch.stack(pairs, -1).flatten(1)[:, :numel]
    return drawn.float().reshape(len(samples), *shape)
