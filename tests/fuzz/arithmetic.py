"""Features that are arithmetic on raw parameters, views, in-place writes, and reductions that mix rows."""

from random import Random

import einops
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fuzz.registry import CHANNELS_FIRST, Block, Sizes, feature


@feature(weight=3)
class ScaleAndShift(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.scale, self.shift = nn.Parameter(torch.ones(sizes.width)), nn.Parameter(torch.zeros(sizes.width))

    def forward(self, h: Tensor) -> Tensor:
        return h * self.per_channel(self.scale, h) + self.per_channel(self.shift, h)


@feature(weight=1)
class ScalarParameters(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.gain = nn.Parameter(torch.tensor(0.5))
        self.slope = nn.Parameter(torch.ones(1))

    def forward(self, h: Tensor) -> Tensor:
        y = h * self.gain.exp() + F.softplus(self.slope)
        return torch.lerp(h, torch.sin(y).to(h.dtype), torch.sigmoid(self.slope).to(h.dtype))


@feature("vector", "sequence", weight=3)
class RawMatrix(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.w, self.b = nn.Parameter(torch.zeros(sizes.width, sizes.width)), nn.Parameter(torch.zeros(sizes.width))
        self.how = draw.choice(["matmul", "einsum", "linear", "addmm", "t", "gain", "tensordot", "outer"])

    def forward(self, h: Tensor) -> Tensor:
        if self.how == "matmul":
            return h @ self.w + self.b
        if self.how == "einsum":
            return torch.einsum("...c,cd->...d", h, self.w) + self.b
        if self.how == "linear":
            return F.linear(h, self.w, self.b)
        if self.how == "addmm":
            return torch.addmm(self.b, h.reshape(-1, h.shape[-1]), self.w).reshape(h.shape)
        if self.how == "t":
            return torch.matmul(h, self.w.t() / self.w.norm()) + self.b
        if self.how == "gain":
            return F.linear(h, (self.w / self.w.square().mean(1, keepdim=True).sqrt()).to(h.dtype))
        if self.how == "tensordot":
            return torch.tensordot(h, self.w.to(h.dtype), dims=([-1], [0]))
        return h @ torch.outer(self.b, self.w[0])


@feature("image", weight=2)
class FunctionalConvolution(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.weight, self.bias = (
            nn.Parameter(torch.zeros(sizes.width, sizes.width, 3, 3)),
            nn.Parameter(torch.zeros(sizes.width)),
        )
        self.register_buffer("resample", torch.tensor([[1.0, 1.0], [1.0, 1.0]])[None, None] / 4)
        self.resampled, self.unit = draw.random() < 0.4, draw.random() < 0.5

    def forward(self, h: Tensor) -> Tensor:
        w = self.weight
        if self.unit:
            w = w / (1e-4 + torch.linalg.vector_norm(w, dim=[1, 2, 3], keepdim=True))
        y = F.conv2d(h, w.to(h.dtype), self.bias.to(h.dtype), padding=1)
        if self.resampled:
            f, c = self.resample.to(h.dtype), h.shape[1]
            y = F.conv2d(y, f.tile([c, 1, 1, 1]), groups=c, stride=2)
            y = F.conv_transpose2d(y, f.mul(4).tile([c, 1, 1, 1]), groups=c, stride=2)
        return y


@feature("image", weight=1)
class Modulated(Block):
    takes = ("h", "emb")

    def build(self, draw: Random, sizes: Sizes) -> None:
        self.style = nn.Linear(sizes.width, sizes.width)
        self.weight = nn.Parameter(torch.zeros(sizes.width, sizes.width, 3, 3))

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        b, c, height, width = h.shape
        w = self.weight[None] * (1 + self.style(emb))[:, None, :, None, None]  # [B, out, in, 3, 3]
        w = w * (w.square().sum([2, 3, 4], keepdim=True) + 1e-6).rsqrt()
        y = F.conv2d(h.reshape(1, b * c, height, width), w.reshape(b * c, c, 3, 3), padding=1, groups=b)
        return y.reshape(b, c, height, width)


@feature("image", weight=1)
class NetworkInNetwork(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.w, self.b = nn.Parameter(torch.zeros(sizes.width, sizes.width)), nn.Parameter(torch.zeros(sizes.width))

    def forward(self, h: Tensor) -> Tensor:
        y = torch.einsum("bhwc,cd->bhwd", h.permute(0, 2, 3, 1), self.w) + self.b
        return y.permute(0, 3, 1, 2)


@feature("image", weight=0.5)
class Spectral(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.filter = nn.Parameter(torch.zeros(sizes.width, sizes.size, sizes.size // 2 + 1, 2))

    def forward(self, h: Tensor) -> Tensor:
        f = torch.fft.rfft2(h, norm="ortho") * torch.view_as_complex(self.filter)
        return torch.fft.irfft2(f, s=h.shape[-2:], norm="ortho")


@feature("image", weight=0.5)
class Warped(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.theta = nn.Parameter(torch.zeros(2, 3))

    def forward(self, h: Tensor) -> Tensor:
        grid = F.affine_grid(self.theta.expand(len(h), -1, -1), list(h.shape), align_corners=False)
        return F.grid_sample(h, grid.to(h.dtype), align_corners=False)


@feature(weight=2)
class FilledZeros(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.p = nn.Parameter(torch.zeros(sizes.width))
        self.how = draw.choice(["halves", "strided", "rows", "empty", "new_zeros", "last"])

    def forward(self, h: Tensor) -> Tensor:
        y = h * self.per_channel(self.p, h)
        out = torch.zeros_like(h)
        if self.how == "halves":
            half = h.shape[1] // 2
            out[:, :half] = y[:, :half]
            out[:, half:] += 2 * y[:, half:]
        elif self.how == "strided":
            out[:, ::2] = y[:, ::2]
            out[:, 1::2].add_(y[:, 1::2], alpha=0.5)
        elif self.how == "rows":
            for i in range(len(h)):
                out[i] = y[i] + 1
        elif self.how == "empty":
            out = torch.empty_like(h)
            out.copy_(y)
        elif self.how == "new_zeros":
            out = h.new_zeros(h.shape)
            out += y
        else:
            out[..., -1] = y[..., -1]
        return h + out


@feature(weight=2)
class ViewsWritten(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.p = nn.Parameter(torch.zeros(sizes.width))
        self.how = draw.choice(["chunk", "view", "select", "masked", "fill", "transpose", "unbind"])

    def forward(self, h: Tensor) -> Tensor:
        y = h.clone(memory_format=torch.contiguous_format)
        p = self.per_channel(self.p, h)
        if self.how == "chunk":
            half = y.shape[self.channel_dim] // 2  # autograd refuses writes to the results of chunk
            a, b = (
                y.split(half, self.channel_dim)
                if not y.requires_grad
                else [y.narrow(self.channel_dim, i, half) for i in (0, half)]
            )
            a.add_(b)
            b.mul_(0.5)
        elif self.how == "view":
            y.view(len(y), -1)[:, 0] = 0.25
        elif self.how == "select":
            y.select(1, 0).mul_(2).add_(1)
        elif self.how == "masked":
            y.masked_fill_(y > 1, 1.0)
        elif self.how == "fill":
            y[:, 0].fill_(0.5)
        elif self.how == "transpose":
            y.transpose(0, 1)[0] += 1
        else:
            (y.select(1, 0) if y.requires_grad else y.unbind(1)[0]).mul_(3)
        return y * p


@feature(weight=1)
class WriteMemberValues(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.p = nn.Parameter(torch.zeros(sizes.width))
        self.register_buffer("base", torch.linspace(0, 1, sizes.width))

    def forward(self, h: Tensor) -> Tensor:
        start = torch.zeros(self.p.shape, dtype=h.dtype, device=h.device)
        view = start[: len(start) // 2]
        start += self.p  # a common tensor becomes the members'
        (start[: len(start) // 2] if start.requires_grad else view).mul_(2)
        return h + self.per_channel(start + self.base.to(h.dtype), h)


@feature(weight=2)
class Indexed(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.p = nn.Parameter(torch.zeros(sizes.width))
        self.how = draw.choice(["index_add", "scatter", "gather", "take", "index_select", "list", "topk", "sort"])

    def forward(self, h: Tensor) -> Tensor:
        dim, y = self.channel_dim % h.ndim, h * self.per_channel(self.p, h)
        ids = torch.arange(y.shape[dim], device=h.device).flip(0)
        shape = [1] * h.ndim
        shape[dim] = -1
        if self.how == "index_add":
            return torch.zeros_like(y).index_add(dim, ids // 2, y)
        if self.how == "scatter":
            return torch.zeros_like(y).scatter_add_(dim, ids.reshape(shape).expand(y.shape), y)
        if self.how == "gather":
            return y.gather(dim, ids.reshape(shape).expand(y.shape))
        if self.how == "take":
            return torch.take_along_dim(y, ids.reshape(shape), dim)
        if self.how == "index_select":
            return y.index_select(dim, ids)
        if self.how == "list":
            return torch.cat([y[:, [1, 0]], y[:, 2:]], 1)
        if self.how == "topk":
            return y + y.topk(2, dim).values.mean(dim, keepdim=True)
        return y.sort(dim).values


@feature(weight=2)
class Rearranged(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.p = nn.Parameter(torch.zeros(sizes.width))
        self.how = draw.choice(["stack", "split", "permute", "expand", "repeat", "unflatten", "movedim", "roll"])

    def forward(self, h: Tensor) -> Tensor:
        y = h * self.per_channel(self.p, h)
        dim = self.channel_dim % h.ndim
        if self.how == "stack":
            return torch.stack([h, y, h + y]).mean(0)
        if self.how == "split":
            a, b = y.split([1, y.shape[dim] - 1], dim)
            return torch.cat([b, a], dim)
        if self.how == "permute":
            order = list(range(h.ndim))[::-1]
            return y.permute(order).contiguous().tanh().permute(order)
        if self.how == "expand":
            return h + y.mean(dim, keepdim=True).expand_as(h)
        if self.how == "repeat":
            return y.narrow(dim, 0, 1).repeat_interleave(h.shape[dim], dim) * h
        if self.how == "unflatten":
            return y.unflatten(dim, (2, -1)).flip(dim).flatten(dim, dim + 1)
        if self.how == "movedim":
            return y.movedim(0, -1).softmax(dim - 1).movedim(-1, 0)
        return y.roll(1, dim)


@feature(weight=2)
class Elementwise(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.p = nn.Parameter(torch.zeros(sizes.width))
        self.how = draw.choice(
            ["clamp", "where", "pow", "atan2", "minimum", "addcmul", "hypot", "div", "logsumexp", "out"]
        )

    def forward(self, h: Tensor) -> Tensor:
        p, dim = self.per_channel(self.p, h), self.channel_dim
        if self.how == "clamp":
            return h.clamp(-1, 1) + p.clamp(min=0)
        if self.how == "where":
            return torch.where(h > 0, h * p, p)
        if self.how == "pow":
            return h.abs().pow(p.abs() + 1)
        if self.how == "atan2":
            return torch.atan2(h, p.abs() + 1)
        if self.how == "minimum":
            return torch.minimum(torch.maximum(h, p - 1), p + 1)
        if self.how == "addcmul":
            return torch.addcmul(h, h, p, value=0.5)
        if self.how == "hypot":
            return torch.hypot(h, p)
        if self.how == "div":
            return h / (1 + p.square()) - 2 / (h.square() + 1)
        if self.how == "logsumexp":
            return h - torch.logsumexp(h * p, dim, keepdim=True)
        out = torch.empty_like(h)
        return torch.mul(h, 2.0, out=out) if not (h.requires_grad or torch.is_grad_enabled()) else h * 2.0


@feature(*CHANNELS_FIRST, weight=1)
class ChannelsLast(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.linear, self.norm = nn.Linear(sizes.width, sizes.width), nn.LayerNorm(sizes.width)

    def forward(self, h: Tensor) -> Tensor:
        return self.linear(self.norm(h.movedim(1, -1))).movedim(-1, 1)


@feature(*CHANNELS_FIRST, "sequence", weight=0.7)
class Einops(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.scale = nn.Parameter(torch.zeros(sizes.width))

    def forward(self, h: Tensor) -> Tensor:
        if self.channel_dim == -1:
            scale = einops.rearrange(self.scale, "c -> 1 1 c")
            return einops.rearrange(
                einops.rearrange(h * scale, "b l (g c) -> b g l c", g=2).tanh(), "b g l c -> b l (g c)"
            )
        flat = einops.rearrange(h, "b c ... -> b (...) c") * einops.rearrange(self.scale, "c -> 1 1 c")
        return h + einops.reduce(flat, "b n c -> b c", "mean").reshape(*h.shape[:2], *[1] * (h.ndim - 2))


@feature(weight=1)
class Constants(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.register_buffer("scale", torch.linspace(0.5, 1.5, sizes.width))
        self.register_buffer("count", torch.tensor(3), persistent=False)

    def forward(self, h: Tensor) -> Tensor:
        ramp = torch.linspace(0, 1, h.shape[-1], dtype=h.dtype, device=h.device)
        return h * self.per_channel(self.scale, h) + ramp / self.count


@feature(weight=2)
class Conditioned(Block):
    takes = ("h", "emb")

    def build(self, draw: Random, sizes: Sizes) -> None:
        self.film = nn.Linear(sizes.width, 2 * sizes.width)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.film(F.silu(emb)).chunk(2, dim=1)
        return h * (1 + self.per_channel(scale, h)) + self.per_channel(shift, h)


@feature(weight=1)
class Preconditioned(Block):
    takes = ("h", "t")

    def build(self, draw: Random, sizes: Sizes) -> None:
        self.linear = nn.Linear(sizes.width, sizes.width)
        self.sigma_data = 0.5

    def forward(self, h: Tensor, t: Tensor) -> Tensor:
        sigma = t.reshape(-1, *[1] * (h.ndim - 1)).to(h.dtype) + 0.1
        c_skip = self.sigma_data**2 / (sigma**2 + self.sigma_data**2)
        c_in = 1 / (self.sigma_data**2 + sigma**2).sqrt()
        y = self.linear((c_in * h).movedim(self.channel_dim, -1)).movedim(-1, self.channel_dim)
        return c_skip * h + sigma * y
