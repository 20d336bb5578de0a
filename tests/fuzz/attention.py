"""Features with attention, positions and token embeddings."""

import math
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fuzz.registry import CHANNELS_FIRST, FEATURES, Block, Sizes, feature, pick


@feature("sequence", weight=3)
class MultiheadAttention(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.batch_first = draw.random() < 0.5
        self.need_weights = draw.random() < 0.3
        self.attention = nn.MultiheadAttention(
            sizes.width, 2, batch_first=self.batch_first, bias=draw.random() < 0.8, add_bias_kv=draw.random() < 0.1
        )

    def forward(self, h: Tensor) -> Tensor:
        y = h if self.batch_first else h.transpose(0, 1)
        y, weights = self.attention(y, y, y, need_weights=self.need_weights)
        if weights is not None:
            y = y + weights.mean()
        return y if self.batch_first else y.transpose(0, 1)


@feature("sequence", weight=4)
class HandWrittenAttention(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.qkv = nn.Linear(sizes.width, 3 * sizes.width, bias=draw.random() < 0.5)
        self.out = nn.Linear(sizes.width, sizes.width)
        self.how = draw.choice(["sdpa", "sdpa", "matmul", "einsum", "bmm", "baddbmm", "causal"])

    def forward(self, h: Tensor) -> Tensor:
        b, n, c = h.shape
        q, k, v = self.qkv(h).chunk(3, dim=-1)
        q, k, v = (y.reshape(b, n, 2, c // 2).transpose(1, 2) for y in (q, k, v))  # [B, heads, L, C/2]
        scale = 1 / math.sqrt(c // 2)
        if self.how in ("sdpa", "causal"):
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.how == "causal")
        elif self.how == "matmul":
            y = torch.softmax(q @ k.transpose(-1, -2) * scale, dim=-1) @ v
        elif self.how == "einsum":
            weights = torch.einsum("bhnd,bhmd->bhnm", q * scale, k).softmax(-1)
            y = torch.einsum("bhnm,bhmd->bhnd", weights, v)
        else:
            q, k, v = (y.reshape(b * 2, n, c // 2) for y in (q, k, v))
            if self.how == "bmm":
                weights = torch.bmm(q, k.mT).mul(scale).softmax(-1)
            else:
                start = torch.empty(b * 2, n, n, dtype=h.dtype, device=h.device)
                weights = torch.baddbmm(start, q, k.transpose(1, 2), beta=0, alpha=scale).softmax(-1)
            y = torch.bmm(weights, v).reshape(b, 2, n, c // 2)
        return self.out(y.transpose(1, 2).reshape(b, n, c))


@feature("sequence", weight=1)
class Qkv5d(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.qkv, self.half = nn.Linear(sizes.width, 3 * sizes.width), draw.random() < 0.5

    def forward(self, h: Tensor) -> Tensor:
        b, n, c = h.shape
        q, k, v = self.qkv(h).view(b, n, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        if self.half:
            q = q * 0.5
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@feature("sequence", weight=2)
class TransformerLayer(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.layer = nn.TransformerEncoderLayer(
            sizes.width, 2, 8, dropout=0.0, batch_first=draw.random() < 0.6, norm_first=draw.random() < 0.5
        )

    def forward(self, h: Tensor) -> Tensor:
        if not self.layer.self_attn.batch_first:
            return self.layer(h.transpose(0, 1)).transpose(0, 1)
        return self.layer(h)


@feature("sequence", weight=1)
class CrossAttention(Block):
    takes = ("h", "context")

    def build(self, draw: Random, sizes: Sizes) -> None:
        self.attention = nn.MultiheadAttention(sizes.width, 2, batch_first=True)
        self.empty = nn.Parameter(torch.zeros(1, 3, sizes.width))

    def forward(self, h: Tensor, context: Tensor | None) -> Tensor:
        usable = torch.is_tensor(context) and context.ndim == 3 and context.shape[-1] == h.shape[-1]
        tokens = context if usable and context.is_floating_point() else self.empty.expand(len(h), -1, -1)
        return self.attention(h, tokens, tokens, need_weights=False)[0]


@feature("sequence", weight=1)
class Codebook(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        entries = draw.choice([sizes.rows, sizes.rows * sizes.members, 5])
        self.codes = nn.Parameter(torch.zeros(entries, sizes.width))

    def forward(self, h: Tensor) -> Tensor:
        return (h @ self.codes.t()).softmax(-1) @ self.codes


@feature("sequence", weight=1)
class LearnedPositions(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.table = nn.Parameter(torch.zeros(1, 64, sizes.width))

    def forward(self, h: Tensor) -> Tensor:
        return h + self.table[:, : h.shape[1]]


@feature("sequence", weight=1)
class PositionEmbedding(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.how = draw.choice(["layer", "functional", "table", "gather", "index_select"])
        self.embedding = nn.Embedding(64, sizes.width, padding_idx=draw.choice([None, 0]))

    def forward(self, h: Tensor) -> Tensor:
        ids = torch.arange(h.shape[1], device=h.device)
        table = self.embedding.weight
        if self.how == "layer":
            return h + self.embedding(ids)
        if self.how == "functional":
            return h + F.embedding(ids.expand(len(h), -1), table)
        if self.how == "table":
            return h * table[ids] + table[2]
        if self.how == "gather":
            return h + table.gather(0, ids[:, None].expand(-1, table.shape[1]))
        return h + torch.index_select(table, 0, ids)


@feature("sequence", weight=1)
class Rotary(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.register_buffer("frequency", torch.arange(1, sizes.width // 2 + 1) / 10, persistent=draw.random() < 0.5)
        self.linear = nn.Linear(sizes.width, sizes.width)

    def forward(self, h: Tensor) -> Tensor:
        angle = torch.outer(torch.arange(h.shape[1], dtype=h.dtype), self.frequency.to(h.dtype))  # [L, C/2]
        a, b = self.linear(h).chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


@feature("sequence", weight=1)
class RelativeBias(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.bias = nn.Embedding(32, 1)

    def forward(self, h: Tensor) -> Tensor:
        place = torch.arange(h.shape[1])
        bias = self.bias((place[:, None] - place[None] + 16).clamp(0, 31)).squeeze(-1)  # [L, L]
        return (torch.bmm(h, h.transpose(1, 2)) / h.shape[-1] + bias).softmax(-1).bmm(h)


@feature("sequence", weight=1)
class MaskedAttention(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.q, self.k = (nn.Linear(sizes.width, sizes.width) for _ in range(2))
        self.how = draw.choice(["masked_fill", "float", "bool"])

    def forward(self, h: Tensor) -> Tensor:
        n = h.shape[1]
        keep = torch.ones(n, n, dtype=torch.bool, device=h.device).tril()
        if self.how == "masked_fill":
            scores = torch.einsum("bic,bjc->bij", self.q(h), self.k(h))
            return scores.masked_fill(~keep, -torch.inf).softmax(-1) @ h
        mask = keep if self.how == "bool" else torch.zeros(n, n, dtype=h.dtype).masked_fill_(~keep, -1e4)
        return F.scaled_dot_product_attention(self.q(h), self.k(h), h, attn_mask=mask)


@feature("sequence", weight=1)
class ClassToken(Block):
    takes = ("h", "emb")

    def build(self, draw: Random, sizes: Sizes) -> None:
        self.token = nn.Parameter(torch.zeros(1, 1, sizes.width))
        self.mix = nn.Linear(sizes.width, sizes.width)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        tokens = torch.cat([self.token.expand(len(h), -1, -1), emb[:, None], h], dim=1)
        tokens = self.mix(tokens)
        return tokens[:, 2:] + tokens[:, :1] * tokens[:, 1:2]


@feature("sequence", weight=2)
class AdaptiveNorm(Block):
    takes = ("h", "emb")

    def build(self, draw: Random, sizes: Sizes) -> None:
        self.norm = nn.LayerNorm(sizes.width, elementwise_affine=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(sizes.width, 3 * sizes.width))
        self.inner = nn.Linear(sizes.width, sizes.width)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(emb).chunk(3, dim=1)
        y = self.norm(h) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)
        return h + gate.unsqueeze(1) * self.inner(y)


@feature("sequence", weight=1)
class TokenMixing(Block):
    def build(self, draw: Random, sizes: Sizes) -> None:
        self.how = draw.choice(["roll", "cumsum", "flip", "shift", "mean"])
        self.linear = nn.Linear(sizes.width, sizes.width)

    def forward(self, h: Tensor) -> Tensor:
        y = self.linear(h)
        if self.how == "roll":
            return y.roll(1, 1)
        if self.how == "cumsum":
            return y.cumsum(1) / h.shape[1]
        if self.how == "flip":
            return y.flip(1)
        if self.how == "shift":
            return torch.cat([torch.zeros_like(y[:, :1]), y[:, :-1]], 1)
        return y - y.mean(1, keepdim=True)


@feature("vector", weight=1)
class BagOfIds(Block):
    takes = ("h", "t")

    def build(self, draw: Random, sizes: Sizes) -> None:
        self.bag = nn.EmbeddingBag(10, sizes.width, mode=draw.choice(["mean", "sum", "max"]))

    def forward(self, h: Tensor, t: Tensor) -> Tensor:
        first = (t * 4).long().clamp(0, 8)
        return h + self.bag(torch.stack([first, first + 1], 1))


@feature("vector", "sequence", weight=1)
class EmbeddingOptions(Block):
    takes = ("h", "t")

    def build(self, draw: Random, sizes: Sizes) -> None:
        padding, frequency = draw.choice([None, 0, 3]), draw.random() < 0.5
        self.embedding = nn.Embedding(5, sizes.width, padding_idx=padding, scale_grad_by_freq=frequency)

    def forward(self, h: Tensor, t: Tensor) -> Tensor:
        y = self.embedding((4 * t.detach()).long().clamp(0, 4))
        return h + (y if h.ndim == 2 else y[:, None])


@feature("vector", weight=0.3, stateful=True)
class BoundedEmbedding(Block):
    takes = ("h", "t")

    def build(self, draw: Random, sizes: Sizes) -> None:
        self.embedding = nn.Embedding(5, sizes.width, max_norm=0.8)  # it writes its weights when it is called

    def forward(self, h: Tensor, t: Tensor) -> Tensor:
        return h + self.embedding((4 * t.detach()).long().clamp(0, 4))


@feature(*CHANNELS_FIRST, weight=3)
class AsTokens(Block):
    takes = ("h", "emb", "t", "context")

    def build(self, draw: Random, sizes: Sizes) -> None:
        inner = Sizes("sequence", sizes.width, sizes.size, sizes.members, sizes.rows, sizes.own)
        name = pick(draw, "sequence", lambda b: bool(tags(b)) or b in NESTING or set(b.takes) - set(self.takes))
        self.inner = FEATURES[name](draw, inner)

    def forward(self, h: Tensor, emb: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        tokens = h.flatten(2).transpose(1, 2)  # [B, H*W, C]
        given = {"h": tokens, "emb": emb, "t": t, "context": context}
        y = self.inner(*[given[name] for name in self.inner.takes])
        return h + y.transpose(1, 2).reshape(h.shape)


@feature("sequence", *CHANNELS_FIRST, weight=1)
class Pooled(Block):
    takes = ("h", "emb", "t", "context")

    def build(self, draw: Random, sizes: Sizes) -> None:
        inner = Sizes("vector", sizes.width, sizes.size, sizes.members, sizes.rows, sizes.own)
        name = pick(draw, "vector", lambda b: bool(tags(b)) or b in NESTING or set(b.takes) - set(self.takes))
        self.inner = FEATURES[name](draw, inner)

    def forward(self, h: Tensor, emb: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        spatial = [d for d in range(1, h.ndim) if d != self.channel_dim % h.ndim]
        given = {"h": h.mean(spatial), "emb": emb, "t": t, "context": context}
        return h + self.per_channel(self.inner(*[given[name] for name in self.inner.takes]), h)


NESTING = (AsTokens, Pooled)


def tags(block: type[Block]) -> set[str]:
    """What a comparison must know of a feature; nested features are of those without."""
    names = ("mixing", "random", "stateful", "differs", "coarse", "refusable")
    return {name for name in names if getattr(block, name)}
