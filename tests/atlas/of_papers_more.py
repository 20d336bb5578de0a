"""More networks in the style of what was published: convolutions, signals, tables and molecules."""

import math
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.atlas.of_papers import frequencies
from tests.atlas.registry import network


class GroupNorm32(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).type(x.dtype)


class ADMBlock(nn.Module):
    """arXiv 2105.05233: scale and shift by time and class, resampled inside."""

    def __init__(self, inner: int, outer: int, emb: int, resample: str = "") -> None:
        super().__init__()
        self.in_layers = nn.Sequential(GroupNorm32(4, inner), nn.SiLU(), nn.Conv2d(inner, outer, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, 2 * outer))
        self.out_layers = nn.Sequential(
            GroupNorm32(4, outer), nn.SiLU(), nn.Dropout(0.1), nn.Conv2d(outer, outer, 3, padding=1)
        )
        self.skip = nn.Identity() if inner == outer else nn.Conv2d(inner, outer, 1)
        self.resample = resample

    def resampled(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2, mode="nearest") if self.resample else x

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, conv = self.in_layers[:-1], self.in_layers[-1]
        h, x = conv(self.resampled(norm(x))), self.resampled(x)
        emb_out = self.emb_layers(emb).type(h.dtype)
        while len(emb_out.shape) < len(h.shape):
            emb_out = emb_out[..., None]
        scale, shift = torch.chunk(emb_out, 2, dim=1)
        h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        return self.skip(x) + h


class ADMAttention(nn.Module):
    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.norm, self.heads = GroupNorm32(4, channels), heads
        self.qkv, self.proj_out = nn.Conv1d(channels, 3 * channels, 1), nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, *spatial = x.shape
        x = x.reshape(b, c, -1)
        qkv = self.qkv(self.norm(x))
        width = qkv.shape[1] // (3 * self.heads)
        q, k, v = qkv.reshape(b * self.heads, width * 3, -1).split(width, dim=1)
        scale = 1 / math.sqrt(math.sqrt(width))
        weight = torch.einsum("bct,bcs->bts", q * scale, k * scale)
        weight = torch.softmax(weight.float(), dim=-1).type(weight.dtype)
        h = torch.einsum("bts,bcs->bct", weight, v).reshape(b, -1, qkv.shape[-1])
        return (x + self.proj_out(h)).reshape(b, c, *spatial)


class ADM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.time_embed = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 16))
        self.label_emb = nn.Embedding(5, 16)
        self.inner = nn.Conv2d(3, 8, 3, padding=1)
        self.down = nn.ModuleList([ADMBlock(8, 8, 16), ADMBlock(8, 8, 16, "down"), ADMBlock(8, 16, 16)])
        self.attention = ADMAttention(16, 2)
        self.up = nn.ModuleList([ADMBlock(32, 16, 16), ADMBlock(16, 16, 16, "up"), ADMBlock(24, 8, 16)])
        self.out = nn.Sequential(GroupNorm32(4, 8), nn.SiLU(), nn.Conv2d(8, 6, 3, padding=1))

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        assert (y is not None) == (self.label_emb is not None)
        emb = self.time_embed(frequencies(timesteps, 8)) + self.label_emb(y)
        kept = [self.down[0](self.inner(x.type(torch.float32)), emb)]
        h = self.down[1](kept[0], emb)
        h = self.down[2](h, emb)
        kept.append(h)
        h = self.up[0](torch.cat([self.attention(h), kept.pop()], dim=1), emb)
        h = self.up[2](torch.cat([self.up[1](h, emb), kept.pop()], dim=1), emb)
        return self.out(h.type(x.dtype))


@network("arXiv 2105.05233")
def adm():
    return ADM, lambda b, r: (r(b, 3, 8, 8), r.ids(1000, b), r.ids(5, b))


class NIN(nn.Module):
    """score_sde's layer of one pixel."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.W, self.b = nn.Parameter(torch.zeros(inner, outer)), nn.Parameter(torch.zeros(outer))

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        return (torch.einsum("abcd,de->abce", x, self.W) + self.b).permute(0, 3, 1, 2)


class DDPMpp(nn.Module):
    """arXiv 2011.13456: attention by NIN layers, residuals divided by the root of two, divided by sigma at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer(
            "sigmas", torch.tensor(np.exp(np.linspace(np.log(5), np.log(0.01), 10)).astype(np.float32))
        )
        self.dense, self.project = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 16)), nn.Linear(16, 8)
        self.inner, self.conv0, self.conv1, self.outer = (
            nn.Conv2d(i, o, 3, padding=1) for i, o in ((3, 8), (8, 8), (8, 8), (8, 3))
        )
        self.norm0, self.norm1, self.norm2 = (nn.GroupNorm(2, 8, eps=1e-6) for _ in range(3))
        self.q, self.k, self.v, self.o = (NIN(8, 8) for _ in range(4))

    def attended(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        h = self.norm2(x)
        q, k, v = self.q(h), self.k(h), self.v(h)
        w = torch.einsum("bchw,bcij->bhwij", q, k) * (int(c) ** (-0.5))
        w = F.softmax(torch.reshape(w, (b, height, width, height * width)), dim=-1)
        w = torch.reshape(w, (b, height, width, height, width))
        return (x + self.o(torch.einsum("bhwij,bcij->bchw", w, v))) / np.sqrt(2.0)

    def forward(self, x: Tensor, time_cond: Tensor) -> Tensor:
        temb = self.dense(frequencies(time_cond, 8))
        used = self.sigmas[time_cond.long()]
        x = self.inner(2 * x - 1.0)
        h = self.conv0(F.silu(self.norm0(x)))
        h += self.project(F.silu(temb))[:, :, None, None]
        x = (x + self.conv1(F.silu(self.norm1(h)))) / np.sqrt(2.0)
        return self.outer(self.attended(x)) / used.reshape((x.shape[0], *([1] * len(x.shape[1:]))))


@network("arXiv 2011.13456")
def ddpmpp():
    return DDPMpp, lambda b, r: (r(b, 3, 4, 4), r.ids(10, b))


class DiffWave(nn.Module):
    """arXiv 2009.09761: dilated convolutions, gated, with skips that are summed."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.step = nn.Conv1d(1, 8, 1), nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 16))
        self.dilated = nn.ModuleList([nn.Conv1d(8, 16, 3, padding=2**i, dilation=2**i) for i in range(3)])
        self.diffusion = nn.ModuleList([nn.Linear(16, 8) for _ in range(3)])
        self.spectrum = nn.ModuleList([nn.Conv1d(4, 16, 1) for _ in range(3)])
        self.out = nn.ModuleList([nn.Conv1d(8, 16, 1) for _ in range(3)])
        self.upsample = nn.ConvTranspose2d(1, 1, (3, 8), stride=(1, 4), padding=(1, 2))
        self.skip, self.last = nn.Conv1d(8, 8, 1), nn.Conv1d(8, 1, 1)

    def forward(self, audio: Tensor, diffusion_step: Tensor, spectrogram: Tensor) -> Tensor:
        x = F.relu(self.inner(audio.unsqueeze(1)))
        step = self.step(frequencies(diffusion_step, 8))
        spectrogram = F.leaky_relu(self.upsample(spectrogram.unsqueeze(1)), 0.4).squeeze(1)
        skip = None
        for dilated, diffusion, spectrum, out in zip(
            self.dilated, self.diffusion, self.spectrum, self.out, strict=True
        ):
            y = dilated(x + diffusion(step).unsqueeze(-1)) + spectrum(spectrogram)
            gate, filtered = torch.chunk(y, 2, dim=1)
            residual, kept = torch.chunk(out(torch.sigmoid(gate) * torch.tanh(filtered)), 2, dim=1)
            x = (x + residual) / math.sqrt(2.0)
            skip = kept if skip is None else kept + skip
        return self.last(F.relu(self.skip(skip / math.sqrt(3))))


@network("arXiv 2009.09761")
def diffwave():
    return DiffWave, lambda b, r: (r(b, 16), r.ids(50, b), r(b, 4, 4))


class CSDI(nn.Module):
    """arXiv 2107.03502: transformers over time and over features, for series with gaps."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        layer = partial(nn.TransformerEncoderLayer, d_model=width, nhead=2, dim_feedforward=16, activation="gelu")
        self.time_layer, self.feature_layer = (
            nn.TransformerEncoder(layer(), num_layers=1, enable_nested_tensor=False) for _ in range(2)
        )
        self.inner, self.step, self.mid = nn.Conv1d(2, width, 1), nn.Linear(8, width), nn.Conv1d(width, 2 * width, 1)
        self.out, self.last = nn.Conv1d(width, 2 * width, 1), nn.Conv1d(width, 1, 1)

    def forward(self, x: Tensor, mask: Tensor, diffusion_step: Tensor) -> Tensor:
        b, features, steps = x.shape
        cond = (mask * x).unsqueeze(1)
        h = torch.cat([cond, ((1 - mask) * x).unsqueeze(1)], dim=1).reshape(b, 2, features * steps)
        h = F.relu(self.inner(h)) + F.silu(self.step(frequencies(diffusion_step, 8))).unsqueeze(-1)
        y = h.reshape(b, -1, features, steps).permute(0, 2, 1, 3).reshape(b * features, -1, steps)
        y = self.time_layer(y.permute(2, 0, 1)).permute(1, 2, 0)
        y = y.reshape(b, features, -1, steps).permute(0, 3, 2, 1).reshape(b * steps, -1, features)
        y = self.feature_layer(y.permute(2, 0, 1)).permute(1, 2, 0)
        y = y.reshape(b, steps, -1, features).permute(0, 2, 3, 1).reshape(b, -1, features * steps)
        gate, filtered = torch.chunk(self.mid(y), 2, dim=1)
        residual, skip = torch.chunk(self.out(torch.sigmoid(gate) * torch.tanh(filtered)), 2, dim=1)
        return self.last(F.relu(skip + residual)).reshape(b, features, steps)


@network("arXiv 2107.03502")
def csdi():
    return CSDI, lambda b, r: (r(b, 3, 6), (r(b, 3, 6) > 0).float(), r.ids(50, b))


class TabDDPM(nn.Module):
    """arXiv 2209.15421: an MLP over the row, plus time and class."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.label = nn.Linear(5, 16), nn.Embedding(3, 16)
        self.time_embed = nn.Sequential(nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, 16))
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 16), nn.ReLU())
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor) -> Tensor:
        emb = self.time_embed(frequencies(timesteps, 16)) + F.silu(self.label(y.squeeze()))
        return self.head(self.mlp(self.proj(x) + emb))


@network("arXiv 2209.15421")
def tab_ddpm():
    return TabDDPM, lambda b, r: (r(b, 5), r.ids(1000, b), r.ids(3, b))


class EquivariantLayer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.edge_mlp = nn.Sequential(nn.Linear(2 * width + 2, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.att_mlp = nn.Sequential(nn.Linear(width, 1), nn.Sigmoid())
        self.node_mlp = nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, width))
        self.coord_mlp = nn.Sequential(nn.Linear(2 * width + 2, width), nn.SiLU(), nn.Linear(width, 1, bias=False))

    def forward(self, h: Tensor, x: Tensor, row: Tensor, col: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        apart = x[row] - x[col]
        radial = torch.sum(apart**2, 1).unsqueeze(1)
        apart = apart / (torch.sqrt(radial + 1e-8) + 1)
        given = torch.cat([h[row], h[col], radial, first], dim=1)
        message = self.edge_mlp(given)
        message = message * self.att_mlp(message)
        zeros = message.new_full((h.size(0), message.size(1)), 0)
        gathered = zeros.scatter_add_(0, row.unsqueeze(-1).expand(-1, message.size(1)), message) / 100
        moved = apart * torch.tanh(self.coord_mlp(given))
        pushed = moved.new_full((h.size(0), 3), 0).scatter_add_(0, row.unsqueeze(-1).expand(-1, 3), moved) / 100
        return h + self.node_mlp(torch.cat([h, gathered], dim=1)), x + pushed


class EquivariantDiffusion(nn.Module):
    """arXiv 2203.17003: molecules; all atoms of a batch are rows of one graph, without its centre of mass."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embedding, self.embedding_out = nn.Linear(4, width), nn.Linear(width, 3)
        self.layers = nn.ModuleList([EquivariantLayer(width) for _ in range(2)])

    def forward(self, t: Tensor, xh: Tensor) -> Tensor:
        b, n, _ = xh.shape
        atoms = torch.arange(n)
        row = (torch.arange(b)[:, None, None] * n + atoms[None, :, None]).expand(b, n, n).reshape(-1)
        col = (torch.arange(b)[:, None, None] * n + atoms[None, None, :]).expand(b, n, n).reshape(-1)
        x, h = xh.view(b * n, -1).clone()[:, :3], xh.view(b * n, -1).clone()[:, 3:]
        time = t.view(b, 1).repeat(1, n).view(b * n, 1)
        h = self.embedding(torch.cat([h, time], dim=1))
        first = torch.sum((x[row] - x[col]) ** 2, 1).unsqueeze(1)
        moved = x
        for layer in self.layers:
            h, moved = layer(h, moved, row, col, first)
        vel = (moved - x).view(b, n, 3)
        return torch.cat([vel - vel.mean(dim=1, keepdim=True), self.embedding_out(h).view(b, n, 3)], dim=2)


@network("arXiv 2203.17003")
def equivariant_diffusion():
    return EquivariantDiffusion, lambda b, r: (r.unit(b), r(b, 4, 6))


class MPConv(nn.Module):
    """EDM2's layer: weights of one magnitude, normalised in the pass."""

    def __init__(self, inner: int, outer: int, *kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outer, inner, *kernel))

    def forward(self, x: Tensor, gain: Tensor | float = 1) -> Tensor:
        w = self.weight.to(torch.float32)
        norm = torch.linalg.vector_norm(w, dim=list(range(1, w.ndim)), keepdim=True, dtype=torch.float32)
        w = w / torch.add(1e-4, norm, alpha=np.sqrt(norm.numel() / w.numel()))
        w = (w * (gain / np.sqrt(w[0].numel()))).to(x.dtype)
        return x @ w.t() if w.ndim == 2 else F.conv2d(x, w, padding=(w.shape[-1] // 2,))


class EDM2(nn.Module):
    """arXiv 2312.02696: magnitudes kept by every layer, and the noise level's uncertainty beside the image."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("freqs", 2 * np.pi * torch.linspace(-1, 1, 8))
        self.noise, self.label = MPConv(8, 16), MPConv(5, 16)
        self.inner, self.embed = MPConv(4, 8, 3, 3), MPConv(16, 8)
        self.conv0, self.conv1, self.qkv = MPConv(8, 8, 3, 3), MPConv(8, 8, 3, 3), MPConv(8, 24, 1, 1)
        self.outer, self.logvar = MPConv(8, 3, 3, 3), MPConv(8, 1)
        self.gain, self.emb_gain = nn.Parameter(torch.ones([])), nn.Parameter(torch.zeros([]))

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        sigma = sigma.to(torch.float32).reshape(-1, 1, 1, 1)
        scaled = x / (0.25 + sigma**2).sqrt()
        fourier = torch.cos((sigma.flatten().log() / 4).ger(self.freqs)) * np.sqrt(2)
        emb = F.silu((self.noise(fourier) + self.label(labels * np.sqrt(5))) / np.sqrt(2)) / 0.596
        h = self.inner(torch.cat([scaled, torch.ones_like(scaled[:, :1])], dim=1))
        y = self.conv0(F.silu(h) / 0.596)
        y = F.silu(y * (self.embed(emb, gain=self.emb_gain) + 1).unsqueeze(2).unsqueeze(3)) / 0.596
        h = torch.lerp(h, self.conv1(y), 0.3) / np.sqrt(0.7**2 + 0.3**2)
        q, k, v = (self.qkv(h).reshape(h.shape[0], 2, 4, 3, -1) / 2).unbind(3)
        w = torch.einsum("nhcq,nhck->nhqk", q, k / np.sqrt(q.shape[2])).softmax(dim=3)
        h = h + torch.einsum("nhqk,nhck->nhcq", w, v).reshape(*h.shape)
        out = x * 0.25 / (sigma**2 + 0.25) + self.outer(h.clip_(-256, 256), gain=self.gain) * sigma
        return out, self.logvar(fourier).reshape(-1, 1, 1, 1)


@network("arXiv 2312.02696")
def edm2():
    return EDM2, lambda b, r: (r(b, 3, 4, 4), r.unit(b), r.unit(b, 5))
