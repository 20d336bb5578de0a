"""Networks that no package has, written here in the style of what was published with the paper."""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.atlas.registry import network


def frequencies(t: Tensor, width: int) -> Tensor:
    """Cosines and sines of times."""
    rates = torch.exp(-math.log(10000) * torch.arange(width // 2, dtype=torch.float32) / (width // 2))
    angles = t[:, None].float() * rates[None]
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Attention(nn.Module):
    """As timm's, which DiT and SiT use; U-ViT's has its own rearrangement."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))


class SiTBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(approximate="tanh"), nn.Linear(2 * width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class SiT(nn.Module):
    """arXiv 2401.08740: DiT as a flow, fixed positions, learned variances cut off."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.patch = nn.Conv2d(4, width, 2, 2)
        self.pos_embed = nn.Parameter(torch.zeros(1, 16, width), requires_grad=False)
        self.time = nn.Sequential(nn.Linear(8, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(6, width)
        self.blocks = nn.ModuleList([SiTBlock(width, 2) for _ in range(2)])
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.linear = nn.Linear(width, 2 * 2 * 8)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        h = self.patch(x).flatten(2).transpose(1, 2) + self.pos_embed
        c = self.time(frequencies(t, 8)) + self.label(y)
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        h = self.linear(modulate(self.norm(h), shift, scale))
        side = int(h.shape[1] ** 0.5)
        h = torch.einsum("nhwpqc->nchpwq", h.reshape(h.shape[0], side, side, 2, 2, 8))
        return h.reshape(h.shape[0], 8, side * 2, side * 2).chunk(2, dim=1)[0]


@network("arXiv 2401.08740")
def sit():
    return SiT, lambda b, r: (r(b, 4, 8, 8), r.unit(b), r.ids(6, b))


class UViT(nn.Module):
    """arXiv 2209.12152: time and class are tokens, and long skips are concatenated."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.patch, self.label = nn.Conv2d(3, width, 2, 2), nn.Embedding(5, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, 18, width))
        self.inner, self.middle, self.outer = (nn.ModuleList([Attention(width, 2)]) for _ in range(3))
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(4)])
        self.skip = nn.Linear(2 * width, width)
        self.head, self.final = nn.Linear(width, 12), nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor) -> Tensor:
        b, _, height, width = x.shape
        h = self.patch(x).flatten(2).transpose(1, 2)
        time = frequencies(timesteps, h.shape[-1]).unsqueeze(dim=1)
        h = torch.cat((self.label(y).unsqueeze(dim=1), time, h), dim=1) + self.pos_embed
        kept = h = h + self.inner[0](self.norms[0](h))
        h = h + self.middle[0](self.norms[1](h))
        h = self.skip(torch.cat([h, kept], dim=-1))
        h = h + self.outer[0](self.norms[2](h))
        h = self.head(self.norms[3](h))[:, 2:, :]
        h = h.view(b, height // 2, width // 2, 2, 2, 3).permute(0, 5, 1, 3, 2, 4).reshape(b, 3, height, width)
        return self.final(h)


@network("arXiv 2209.12152")
def u_vit():
    return UViT, lambda b, r: (r(b, 3, 8, 8), r.ids(1000, b), r.ids(5, b))


class Rotary(nn.Module):
    """Keeps its tables from call to call, as SEDD's and MDLM's do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / (10000 ** (torch.arange(0, width, 2).float() / width)))
        self.seq_len_cached, self.cos_cached, self.sin_cached = None, None, None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.shape[1] != self.seq_len_cached:
            self.seq_len_cached = x.shape[1]
            angles = torch.einsum("i,j->ij", torch.arange(x.shape[1]).type_as(self.inv_freq), self.inv_freq)
            angles = torch.cat((angles, angles), dim=-1)
            self.cos_cached, self.sin_cached = angles.cos()[None, :, None], angles.sin()[None, :, None]
        return self.cos_cached, self.sin_cached  # pyright: ignore


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class DDiTBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.attn_qkv, self.attn_out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(approximate="tanh"), nn.Linear(2 * width, width))
        self.adaLN_modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, dim=2)
        h = self.norm1(x) * (1 + scale1) + shift1
        q, k, v = self.attn_qkv(h).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k = rotated(q, *turn), rotated(k, *turn)
        h = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        x = gate1 * self.attn_out(h.transpose(1, 2).flatten(2)) + x
        return gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2) + x


class SEDD(nn.Module):
    """arXiv 2310.16834: ratios of probabilities of tokens; its own token's is zero."""

    def __init__(self, masked: bool, width: int = 16, vocabulary: int = 11) -> None:
        super().__init__()
        self.masked, self.vocabulary = masked, vocabulary
        self.vocab_embed = nn.Embedding(vocabulary, width)
        self.sigma_map = nn.Sequential(nn.Linear(8, width), nn.SiLU(), nn.Linear(width, width))
        self.rotary_emb = Rotary(width // 2)
        self.blocks = nn.ModuleList([DDiTBlock(width, 2) for _ in range(2)])
        self.norm, self.modulation = nn.LayerNorm(width, bias=False), nn.Linear(width, 2 * width)
        self.linear = nn.Linear(width, vocabulary)

    def forward(self, indices: Tensor, sigma: Tensor) -> Tensor:
        x = self.vocab_embed(indices)
        c = F.silu(self.sigma_map(frequencies(sigma, 8)))
        turn = self.rotary_emb(x)
        for block in self.blocks:
            x = block(x, turn, c)
        shift, scale = self.modulation(c)[:, None].chunk(2, dim=2)
        x = self.linear(self.norm(x) * (1 + scale) + shift)
        return self.substituted(x, indices) if self.masked else self.scaled(x, indices, sigma)

    def scaled(self, x: Tensor, indices: Tensor, sigma: Tensor) -> Tensor:
        esigm1 = torch.where(sigma < 0.5, torch.expm1(sigma), sigma.exp() - 1)
        x = x - esigm1.log()[:, None, None] - math.log(self.vocabulary - 1)
        return torch.scatter(x, -1, indices[..., None], torch.zeros_like(x[..., :1]))

    def substituted(self, logits: Tensor, indices: Tensor) -> Tensor:
        """arXiv 2406.07524 (MDLM): no mass on the mask, and tokens that are known stay."""
        mask = self.vocabulary - 1
        logits = torch.cat([logits[..., :mask], torch.full_like(logits[..., mask:], -100.0)], -1)
        logits = logits - torch.logsumexp(logits, dim=-1, keepdim=True)
        known = F.one_hot(indices, self.vocabulary)
        kept = torch.where(known.bool(), 0.0, -100.0).to(logits.dtype)
        return torch.where((indices != mask)[..., None], kept, logits)


@network("arXiv 2310.16834")
def sedd():
    return partial(SEDD, masked=False), lambda b, r: (r.ids(11, b, 6), r.unit(b))


@network("arXiv 2406.07524")
def mdlm():
    return partial(SEDD, masked=True), lambda b, r: (r.ids(11, b, 6), r.unit(b))


class FiLMBlock(nn.Module):
    def __init__(self, inner: int, outer: int, cond: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv1d(inner, outer, 5, padding=2), nn.GroupNorm(4, outer), nn.Mish())
        self.second = nn.Sequential(nn.Conv1d(outer, outer, 5, padding=2), nn.GroupNorm(4, outer), nn.Mish())
        self.cond_encoder = nn.Sequential(nn.Mish(), nn.Linear(cond, 2 * outer), nn.Unflatten(-1, (-1, 1)))
        self.residual_conv = nn.Conv1d(inner, outer, 1) if inner != outer else nn.Identity()

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        out = self.first(x)
        embed = self.cond_encoder(cond).reshape(x.shape[0], 2, out.shape[1], 1)
        return self.second(embed[:, 0] * out + embed[:, 1]) + self.residual_conv(x)


class ConditionalUnet1D(nn.Module):
    """arXiv 2303.04137 (diffusion policy): actions given what was observed."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(8, 16), nn.Mish(), nn.Linear(16, 8))
        self.down = nn.ModuleList([FiLMBlock(2, 8, 13), FiLMBlock(8, 16, 13)])
        self.downsample, self.upsample = nn.Conv1d(8, 8, 3, 2, 1), nn.ConvTranspose1d(8, 8, 4, 2, 1)
        self.mid = FiLMBlock(16, 16, 13)
        self.up = FiLMBlock(32, 8, 13)
        self.final = nn.Sequential(nn.Conv1d(8, 8, 5, padding=2), nn.GroupNorm(4, 8), nn.Mish(), nn.Conv1d(8, 2, 1))

    def forward(self, sample: Tensor, timestep: Tensor | float, global_cond: Tensor) -> Tensor:
        x = sample.moveaxis(-1, -2)
        if not torch.is_tensor(timestep):
            timestep = torch.tensor([timestep], dtype=torch.long, device=sample.device)
        elif len(timestep.shape) == 0:
            timestep = timestep[None].to(sample.device)
        cond = torch.cat([self.time(frequencies(timestep.expand(sample.shape[0]), 8)), global_cond], axis=-1)
        first = self.down[0](x, cond)
        x = kept = self.down[1](self.downsample(first), cond)
        x = torch.cat((self.mid(x, cond), kept), dim=1)
        return self.final(self.upsample(self.up(x, cond))).moveaxis(-1, -2)


@network("arXiv 2303.04137", number="timestep")
def diffusion_policy():
    return ConditionalUnet1D, lambda b, r: {
        "sample": r(b, 8, 2),
        "timestep": r.ids(100, b),
        "global_cond": r(b, 5),
    }
