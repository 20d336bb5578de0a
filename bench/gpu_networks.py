"""The networks of G1 to G3 and G7 on the device and in the dtype of the benchmarks, and what they compute."""

import torch

from bench.gpu_contest import DEVICE, DTYPE, REHEARSAL
from bench.score_networks import NETWORKS, ScoreUNet

SMALL = {"size": 8, "width": 8, "widths": (8, 16), "blocks": 1, "attention": (4,)}


def network(name, seed, dropout=0.0):
    """One member and the size of its images; in a rehearsal a small one of the same kinds of block."""
    settings = NETWORKS[name] | (SMALL if REHEARSAL else {})
    if REHEARSAL and "heads" in settings:
        settings["heads"] = lambda channels: channels // 8
    torch.manual_seed(seed)
    model = ScoreUNet(**settings, dropout=dropout)
    return model.eval().to(DEVICE, DTYPE, memory_format=torch.channels_last), settings["size"]


def flops_per_image(model, x, t):
    """Floating-point operations of one member for one image, as torch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        model(x[:1], t[:1])
    return counter.get_total_flops()


def in_float32(models, x, t):
    """What each of ``models`` gives in float32, 16 images at a time; they come back in the dtype of the benchmark."""
    outputs = []
    for model in models:
        model.float()
        parts = [model(rows.float(), times) for rows, times in zip(x.split(16), t.split(16), strict=True)]
        outputs.append(torch.cat(parts))
        model.to(DTYPE)
    return torch.stack(outputs)
