"""The networks of G1 to G3 and G7: diffusers' blocks with random weights, since speed does not depend on learning."""

from typing import Any

import torch

from bench.gpu_contest import DEVICE, DTYPE, REHEARSAL

RESAMPLING = {"downsample_type": "resnet", "upsample_type": "resnet"}
NETWORKS: dict[str, tuple[int, tuple[int, ...], int, dict[str, Any]]] = {  # size, channels, blocks per level, settings
    # EDM's SongUNet (arXiv 2206.00364) has 55.7 M parameters and 42.4 GFLOP per image; this one 60.7 and 43.6
    "songunet": (32, (256, 256, 256), 4, RESAMPLING),
    # the paper's DDPM++ (arXiv 2011.13456) has 62 M and 21.7; this one 60.1 and 21.8
    "ddpmpp": (32, (128, 256, 256, 256), 4, RESAMPLING),
    # the paper's network for FFHQ-256 (arXiv 2105.05233) has 388 GFLOP per image; this one 336, and 86.4 M parameters
    "ffhq256": (
        256,
        (128, 128, 256, 256, 512, 512),
        1,
        {**RESAMPLING, "attention_head_dim": 64, "out_channels": 6, "resnet_time_scale_shift": "scale_shift"},
    ),
}
ATTENTION = 16  # the resolution that has it


def network(name, seed, dropout=0.0):
    """One member and the size of its images; in a rehearsal a small one of the same kinds of block."""
    from diffusers import UNet2DModel

    size, widths, blocks, settings = NETWORKS[name]
    settings = {"out_channels": 3, "attention_head_dim": None, **settings}
    attention = ATTENTION
    if REHEARSAL:
        size, widths, blocks, attention = 8, (8, 16), 1, 4
        settings["attention_head_dim"] = settings["attention_head_dim"] and 8
    sizes = [size >> level for level in range(len(widths))]
    torch.manual_seed(seed)
    model = UNet2DModel(
        sample_size=size,
        in_channels=3,
        layers_per_block=blocks,
        block_out_channels=widths,
        norm_num_groups=min(32, widths[0] // 4),
        dropout=dropout,
        down_block_types=tuple("AttnDownBlock2D" if s == attention else "DownBlock2D" for s in sizes),
        up_block_types=tuple("AttnUpBlock2D" if s == attention else "UpBlock2D" for s in reversed(sizes)),
        **settings,
    )
    return model.eval().to(DEVICE, DTYPE, memory_format=torch.channels_last), size


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
        parts = [
            model(rows.float(), times, return_dict=False)[0]
            for rows, times in zip(x.split(16), t.split(16), strict=True)
        ]
        outputs.append(torch.cat(parts))
        model.to(DTYPE)
    return torch.stack(outputs)
