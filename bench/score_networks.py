"""Score networks as they are published, in plain PyTorch, with random weights: speed does not depend on learning.

One U-Net has their residual blocks, attention and time embedding: EDM's SongUNet (Karras et al., arXiv 2206.00364, the
"DDPM++" of CIFAR-10), the DDPM++ of Song et al. (arXiv 2011.13456) and the network of Dhariwal and Nichol (arXiv
2105.05233) in the sizes of FFHQ-256.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


def norm(channels):
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


def conv(inputs, outputs, taps=3):
    return nn.Conv2d(inputs, outputs, taps, padding=taps // 2)


class Attention(nn.Module):
    """Self-attention over the places of an image."""

    def __init__(self, channels, heads, scale):
        super().__init__()
        self.heads, self.scale = heads, scale
        self.norm, self.qkv, self.proj = norm(channels), conv(channels, 3 * channels, 1), conv(channels, channels, 1)

    def forward(self, x):
        rows, channels, height, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(rows, 3, self.heads, channels // self.heads, height * width)
        q, k, v = qkv.transpose(-1, -2).unbind(1)
        out = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(rows, channels, height, width)
        return (x + self.proj(out)) * self.scale


class Block(nn.Module):
    """A residual block, which may halve or double the image, and attention behind it."""

    def __init__(self, inputs, outputs, embedding, *, resample=None, heads=0, dropout=0.0, maps=False, scale=1.0):
        super().__init__()
        self.resample, self.maps, self.scale = resample, maps, scale
        self.norm0, self.conv0 = norm(inputs), conv(inputs, outputs)
        self.time = nn.Linear(embedding, outputs * (2 if maps else 1))
        self.norm1, self.dropout, self.conv1 = norm(outputs), nn.Dropout(dropout), conv(outputs, outputs)
        self.skip = conv(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.attention = Attention(outputs, heads, scale) if heads else nn.Identity()

    def resampled(self, x):
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2.0, mode="nearest") if self.resample == "up" else x

    def forward(self, x, emb):
        y = self.conv0(self.resampled(F.silu(self.norm0(x))))
        time = self.time(emb)[:, :, None, None]
        if self.maps:
            scale, shift = time.chunk(2, 1)
            y = F.silu(self.norm1(y) * (1 + scale) + shift)
        else:
            y = F.silu(self.norm1(y + time))
        y = self.conv1(self.dropout(y)) + self.skip(self.resampled(x))
        return self.attention(y * self.scale)


class ScoreUNet(nn.Module):
    """A U-Net of a noisy image [B, 3, size, size] and times [B]; it returns [B, outputs, size, size].

    Args:
        size: of the image.
        width: channels of the first convolution.
        widths: channels of each level.
        blocks: residual blocks of a level on the way down; one more on the way up.
        attention: sizes of images that have attention.
        heads: of attention with so many channels.
        everywhere: attention behind all blocks of these sizes on the way up, and not the last one alone.
        maps: the time scales and shifts the second norm, and is not added before it.
        scale: of the sums of residual blocks.
        outputs: channels of the result.
        dropout: probability in residual blocks.
    """

    def __init__(
        self, size, width, widths, blocks, *, attention=(16,), heads=lambda channels: 1, everywhere=False, maps=False,
        scale=1.0, outputs=3, dropout=0.0,
    ):  # fmt: skip
        super().__init__()
        emb = 4 * width
        self.width = width
        self.embed = nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb), nn.SiLU())
        self.first = conv(3, width)
        settings = {"dropout": dropout, "maps": maps, "scale": scale}
        self.down, self.up, channels, skips = nn.ModuleList(), nn.ModuleList(), width, [width]

        def attend(level, outputs):
            return heads(outputs) if size >> level in attention else 0

        for level, outputs_ in enumerate(widths):
            if level:
                self.down.append(Block(channels, channels, emb, resample="down", **settings))
                skips.append(channels)
            for _ in range(blocks):
                self.down.append(Block(channels, outputs_, emb, heads=attend(level, outputs_), **settings))
                channels = outputs_
                skips.append(channels)
        self.middle = nn.ModuleList(Block(channels, channels, emb, heads=h, **settings) for h in (heads(channels), 0))
        for level, outputs_ in reversed(list(enumerate(widths))):
            for i in range(blocks + 1):
                has = attend(level, outputs_) if everywhere or i == blocks else 0
                self.up.append(Block(channels + skips.pop(), outputs_, emb, heads=has, **settings))
                channels = outputs_
            if level:
                self.up.append(Block(channels, channels, emb, resample="up", **settings))
        self.last_norm, self.last = norm(channels), conv(channels, outputs)

    def forward(self, x, t):
        steps = torch.arange(self.width // 2, device=t.device, dtype=torch.float32)
        angles = t.float()[:, None] * torch.exp(-math.log(10000.0) / len(steps) * steps)
        emb = self.embed(torch.cat([angles.cos(), angles.sin()], 1).to(x.dtype))
        x = self.first(x)
        skips = [x]
        for block in self.down:
            x = block(x, emb)
            skips.append(x)
        for block in self.middle:
            x = block(x, emb)
        for block in self.up:
            x = block(x if block.resample else torch.cat([x, skips.pop()], 1), emb)
        return self.last(F.silu(self.last_norm(x)))


NETWORKS = {
    # 55.7 M parameters, 42.4 GFLOP per image
    "songunet": {"size": 32, "width": 128, "widths": (256, 256, 256), "blocks": 4, "scale": 0.5**0.5},
    # 62 M and 21.7
    "ddpmpp": {
        "size": 32, "width": 128, "widths": (128, 256, 256, 256), "blocks": 4, "scale": 0.5**0.5, "everywhere": True
    },
    # 388 GFLOP
    "ffhq256": {
        "size": 256, "width": 128, "widths": (128, 128, 256, 256, 512, 512), "blocks": 1, "maps": True, "outputs": 6,
        "everywhere": True, "heads": lambda channels: channels // 64,
    },
}  # fmt: skip
