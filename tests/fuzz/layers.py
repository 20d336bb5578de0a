"""Features that are torch's own layers: linear, convolution, normalisation, pooling, embedding, recurrence."""

from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fuzz.registry import CHANNELS_FIRST, Block, Sizes, feature

CONV = {"signal": nn.Conv1d, "image": nn.Conv2d, "volume": nn.Conv3d}
TRANSPOSED = {"signal": nn.ConvTranspose1d, "image": nn.ConvTranspose2d, "volume": nn.ConvTranspose3d}
BATCH_NORM = {"vector": nn.BatchNorm1d, "signal": nn.BatchNorm1d, "image": nn.BatchNorm2d, "volume": nn.BatchNorm3d}
INSTANCE_NORM = {"signal": nn.InstanceNorm1d, "image": nn.InstanceNorm2d, "volume": nn.InstanceNorm3d}
ACTIVATIONS = (nn.SiLU, nn.ReLU, nn.GELU, nn.Tanh, nn.ELU, nn.Mish, nn.Softplus, nn.LeakyReLU, nn.Hardswish)


@feature("vector", "sequence", weight=6)
class Linear(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.linear = nn.Linear(sizes.width, sizes.width, bias=draw.random() < 0.7)

    def forward(self, h: Tensor) -> Tensor:
        return self.linear(h)


@feature("vector", "sequence", weight=4)
class Perceptron(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        hidden = draw.choice([8, 12, sizes.rows * sizes.members])
        self.layers = nn.Sequential(
            nn.Linear(sizes.width, hidden), draw.choice(ACTIVATIONS)(), nn.Linear(hidden, sizes.width)
        )

    def forward(self, h: Tensor) -> Tensor:
        return self.layers(h)


@feature(*CHANNELS_FIRST, weight=10)
class Convolution(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        kernel, dilation = draw.choice([(1, 1), (3, 1), (3, 1), (3, 2)])
        self.conv = CONV[sizes.frame](
            sizes.width,
            sizes.width,
            kernel,
            padding=dilation * (kernel // 2),
            dilation=dilation,
            groups=draw.choice([1, 1, 1, 2, sizes.width]),
            bias=draw.random() < 0.8,
            padding_mode=draw.choice(["zeros", "zeros", "zeros", "circular", "replicate"]),
        )

    def forward(self, h: Tensor) -> Tensor:
        return self.conv(h)


@feature(*CHANNELS_FIRST, weight=2)
class SamePadding(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.conv = CONV[sizes.frame](sizes.width, sizes.width, draw.choice([2, 3]), padding="same")

    def forward(self, h: Tensor) -> Tensor:
        return self.conv(h)


@feature(*CHANNELS_FIRST, weight=3)
class DownAndUp(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.down = CONV[sizes.frame](sizes.width, 2 * sizes.width, 3, stride=2, padding=1)
        self.up = TRANSPOSED[sizes.frame](2 * sizes.width, sizes.width, 4, stride=2, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        return self.up(F.silu(self.down(h)))


@feature(*CHANNELS_FIRST, weight=2)
class ResidualBlock(Block):
    takes = ("h", "emb")

    def build(self, draw: Random, sizes: Sizes) -> None:
        conv = CONV[sizes.frame]
        self.norm1, self.norm2 = nn.GroupNorm(2, sizes.width), nn.GroupNorm(2, sizes.width, eps=1e-6)
        self.conv1, self.conv2 = (conv(sizes.width, sizes.width, 3, padding=1) for _ in range(2))
        self.dropout = nn.Dropout(0.0)
        self.emb = nn.Linear(sizes.width, sizes.width)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(h)))
        y = y + self.per_channel(self.emb(F.silu(emb)), h)
        return self.conv2(self.dropout(F.silu(self.norm2(y))))


@feature(*CHANNELS_FIRST, weight=2)
class NearestUpsample(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.conv = CONV[sizes.frame](sizes.width, sizes.width, 3, padding=1)
        self.pool = {"signal": F.avg_pool1d, "image": F.avg_pool2d, "volume": F.avg_pool3d}[sizes.frame]

    def forward(self, h: Tensor) -> Tensor:
        return self.conv(F.interpolate(self.pool(h, 2), scale_factor=2, mode="nearest"))


@feature(*CHANNELS_FIRST, weight=1)
class SmoothUpsample(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.mode = {"signal": "linear", "image": draw.choice(["bilinear", "bicubic"]), "volume": "trilinear"}[
            sizes.frame
        ]
        self.pool = {"signal": nn.MaxPool1d, "image": nn.MaxPool2d, "volume": nn.MaxPool3d}[sizes.frame](2)
        self.conv = CONV[sizes.frame](sizes.width, sizes.width, 1)

    def forward(self, h: Tensor) -> Tensor:
        small = self.conv(self.pool(h))
        return F.interpolate(small, size=h.shape[2:], mode=self.mode, align_corners=False)


@feature("image", weight=1)
class PixelShuffle(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.conv = nn.Conv2d(4 * sizes.width, 4 * sizes.width, 1)
        self.layer = draw.random() < 0.5
        self.shuffle, self.unshuffle = nn.PixelShuffle(2), nn.PixelUnshuffle(2)

    def forward(self, h: Tensor) -> Tensor:
        if self.layer:
            return self.shuffle(self.conv(self.unshuffle(h)))
        return F.pixel_shuffle(self.conv(F.pixel_unshuffle(h, 2)), 2)


@feature("image", weight=1)
class ReflectedPad(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.mode = draw.choice(["reflect", "constant", "replicate", "circular"])
        self.conv = nn.Conv2d(sizes.width, sizes.width, 3)

    def forward(self, h: Tensor) -> Tensor:
        return self.conv(F.pad(h, (1, 1, 1, 1), mode=self.mode))


@feature("image", weight=1)
class PadModule(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.layers = nn.Sequential(
            draw.choice([nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d])(1),
            nn.Conv2d(sizes.width, sizes.width, 3),
        )

    def forward(self, h: Tensor) -> Tensor:
        return self.layers(h)


@feature("image", weight=1)
class Unfolded(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.linear = nn.Linear(4 * sizes.width, 4 * sizes.width)

    def forward(self, h: Tensor) -> Tensor:
        patches = F.unfold(h, 2, stride=2).transpose(1, 2)  # [B, HW/4, 4C]
        return F.fold(self.linear(patches).transpose(1, 2), h.shape[2:], 2, stride=2)


@feature("image", weight=1)
class SqueezeExcite(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(nn.Flatten(), nn.Linear(sizes.width, 4), nn.ReLU(), nn.Linear(4, sizes.width))

    def forward(self, h: Tensor) -> Tensor:
        return h * torch.sigmoid(self.fc(self.pool(h)))[:, :, None, None]


@feature(weight=4)
class GroupNorm(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.norm = nn.GroupNorm(2, sizes.width, eps=draw.choice([1e-5, 1e-3]), affine=draw.random() < 0.8)

    def forward(self, h: Tensor) -> Tensor:
        if self.channel_dim == -1 and h.ndim > 2:
            return self.norm(h.transpose(1, 2)).transpose(1, 2)
        return self.norm(h)


@feature("vector", "sequence", weight=4)
class LayerNorm(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        kind = draw.choice([nn.LayerNorm, nn.LayerNorm, nn.RMSNorm])
        self.norm = kind(sizes.width, elementwise_affine=draw.random() < 0.7)

    def forward(self, h: Tensor) -> Tensor:
        return self.norm(h)


@feature("vector", *CHANNELS_FIRST, weight=2, stateful=True, mixing=True, in_training=True)
class BatchNorm(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.norm = BATCH_NORM[sizes.frame](sizes.width)

    def forward(self, h: Tensor) -> Tensor:
        return self.norm(h) if h.numel() > h.shape[1] else h


@feature("vector", *CHANNELS_FIRST, weight=0.4, mixing=True)
class BatchNormOfTheBatch(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.norm = BATCH_NORM[sizes.frame](sizes.width, track_running_stats=False, eps=0.1)

    def forward(self, h: Tensor) -> Tensor:
        return self.norm(h) if h.numel() > h.shape[1] else h


@feature(*CHANNELS_FIRST, weight=2, stateful=True, in_training=True)
class InstanceNorm(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.norm = INSTANCE_NORM[sizes.frame](
            sizes.width, affine=draw.random() < 0.6, track_running_stats=draw.random() < 0.3
        )

    def forward(self, h: Tensor) -> Tensor:
        if (
            torch.is_grad_enabled() and len(h) == 1
        ):  # where torch's gradient is wrong if that of the result has channels last
            return self.norm(torch.cat([h, h]))[:1]
        return self.norm(h)


@feature("image", weight=1)
class LocalResponseNorm(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.norm, self.conv = nn.LocalResponseNorm(2), nn.Conv2d(sizes.width, sizes.width, 1)

    def forward(self, h: Tensor) -> Tensor:
        return self.norm(self.conv(h))


@feature(weight=2)
class PReLU(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        per_channel = self.channel_dim == 1 or sizes.frame == "vector"
        self.prelu = nn.PReLU(sizes.width if per_channel and draw.random() < 0.5 else 1)

    def forward(self, h: Tensor) -> Tensor:
        return self.prelu(h)


@feature(weight=4)
class Activation(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.act = draw.choice([*ACTIVATIONS, nn.Sigmoid, nn.Softsign, nn.Identity, nn.ReLU6])()

    def forward(self, h: Tensor) -> Tensor:
        return self.act(h)


@feature(weight=1)
class InPlaceReLU(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.act = nn.ReLU(inplace=True)

    def forward(self, h: Tensor) -> Tensor:
        return self.act(1.5 * h)


@feature("vector", "sequence", weight=1)
class GatedLinear(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.inner, self.gate = nn.Linear(sizes.width, 2 * sizes.width), draw.choice([nn.GLU(), None])

    def forward(self, h: Tensor) -> Tensor:
        if self.gate is not None:
            return self.gate(self.inner(h))
        a, b = self.inner(h).chunk(2, -1)
        return a * F.gelu(b)


@feature("vector", weight=1)
class Bilinear(Block):
    takes = ("h", "emb")

    def build(self, draw: Random, sizes: Sizes) -> None:
        self.bilinear = nn.Bilinear(sizes.width, sizes.width, sizes.width)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        return self.bilinear(h, emb)


@feature("vector", "sequence", weight=2, random=True, in_training=True)
class Dropout(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.dropout = nn.Dropout(0.3)
        self.linear = nn.Linear(sizes.width, sizes.width)

    def forward(self, h: Tensor) -> Tensor:
        return self.dropout(self.linear(h))


@feature("vector", weight=1)
class Cell(Block):
    takes = ("h", "emb")

    def build(self, draw: Random, sizes: Sizes) -> None:
        self.cell = draw.choice([nn.GRUCell, nn.RNNCell, nn.LSTMCell])(sizes.width, sizes.width)
        self.steps = draw.choice([1, 2])

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        state = (emb, emb) if isinstance(self.cell, nn.LSTMCell) else emb
        for _ in range(self.steps):
            state = self.cell(h, state)
        return state[0] if isinstance(state, tuple) else state


@feature("sequence", weight=2)
class Recurrent(Block):
    takes = ("h", "emb")

    def build(self, draw: Random, sizes: Sizes) -> None:
        self.batch_first, self.initial = draw.random() < 0.5, draw.random() < 0.3
        kind = draw.choice([nn.GRU, nn.LSTM, nn.RNN])
        self.two_ways = draw.random() < 0.3
        hidden = sizes.width // 2 if self.two_ways else sizes.width
        self.layers = draw.choice([1, 1, 2])
        self.rnn = kind(sizes.width, hidden, self.layers, batch_first=self.batch_first, bidirectional=self.two_ways)
        self.hidden = hidden

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        y = h if self.batch_first else h.transpose(0, 1)
        state = None
        if self.initial:
            first = emb[:, : self.hidden].expand(self.layers * (1 + self.two_ways), -1, -1).contiguous()
            state = (first, torch.zeros_like(first)) if isinstance(self.rnn, nn.LSTM) else first
        y, _ = self.rnn(y, state)
        return y if self.batch_first else y.transpose(0, 1)


@feature("sequence", weight=1)
class ConvolvedSequence(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.conv = nn.Conv1d(sizes.width, sizes.width, 3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        return self.conv(h.mT).mT


@feature("vector", weight=1)
class OneChannelConvolution(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.conv = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        return self.conv(h.unsqueeze(1)).squeeze(1)


@feature("vector", weight=1)
class UnbatchedConvolution(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.conv = nn.Conv1d(sizes.width, sizes.width, 1)

    def forward(self, h: Tensor) -> Tensor:
        return self.conv(h.t()).t()  # [C, B]: rows as positions of one unbatched signal


@feature("vector", weight=1)
class WeightNorm(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        normed = draw.choice([nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.orthogonal])
        self.linear = normed(nn.Linear(sizes.width, sizes.width))

    def forward(self, h: Tensor) -> Tensor:
        return self.linear(h)


@feature("image", "signal", weight=1, stateful=True, in_training=True)
class SpectralNorm(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        conv = CONV[sizes.frame](sizes.width, sizes.width, 3, padding=1)
        self.conv = (
            nn.utils.parametrizations.spectral_norm(conv) if draw.random() < 0.7 else nn.utils.spectral_norm(conv)
        )

    def forward(self, h: Tensor) -> Tensor:
        return self.conv(h)
