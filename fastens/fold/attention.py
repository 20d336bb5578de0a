"""Folded multi-head attention. Transformer layers need no entry: they run their own code around it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastens.fold.linear import FoldedLinear
from fastens.fold.member_tensor import MemberTensor
from fastens.fold.registry import FoldedLayer, register_layer
from fastens.fold.rows import NotFoldable
from fastens.ops.linear import linear


class FoldedMultiheadAttention(FoldedLayer):
    """Multi-head attention of all members: their projections batched, one attention over the folded batch."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Evaluate as ``nn.MultiheadAttention`` does, batch first or not."""
        return super().forward(
            query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )

    def _batched(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return self._attend(x, *args)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        average_attn_weights: bool,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor | None]:
        inputs = (query, key, value)
        if self.bias_k is not None or self.add_zero_attn or any(isinstance(x, MemberTensor) for x in inputs):
            raise NotFoldable("extra key and value rows, or an input without batch")
        if query.ndim != 3:
            raise NotFoldable("query without batch")
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in inputs)
        if any(x.shape[0] != self.rows.total for x in (query, key, value)):
            raise NotFoldable("query, key or value without batch")
        offsets = self.rows.offsets
        heads = self.num_heads
        q, k, v = (self._project(i, x, offsets) for i, x in enumerate((query, key, value)))
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # [R, heads, tokens, width]
        mask = self._mask(key_padding_mask, attn_mask, q)
        causal = is_causal and attn_mask is None
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
            weights = F.dropout(torch.softmax(scores if mask is None else scores + mask, -1), dropout)
            attended = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            attended = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        joined = attended.transpose(1, 2).flatten(2)
        projection: Any = self.out_proj
        output = linear(joined, projection.stack("weight"), projection.stack("bias"), offsets)
        return (output if self.batch_first else output.transpose(0, 1)), weights

    def _project(self, part: int, x: Tensor, offsets: Tensor | None) -> Tensor:
        width = self.embed_dim
        bias = self.stack("in_proj_bias")
        bias = None if bias is None else bias[:, part * width : (part + 1) * width]
        joint = self.stack("in_proj_weight")
        if joint is None:
            return linear(x, self.stack(("q_proj_weight", "k_proj_weight", "v_proj_weight")[part]), bias, offsets)
        return linear(x, joint[:, part * width : (part + 1) * width], bias, offsets)

    def _mask(self, key_padding_mask: Tensor | None, attn_mask: Tensor | None, q: Tensor) -> Tensor | None:
        def additive(mask: Tensor) -> Tensor:
            if mask.dtype != torch.bool:
                return mask
            return torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, float("-inf"))

        mask = None
        if attn_mask is not None:
            mask = additive(attn_mask)
            if mask.ndim == 3:  # [rows * heads, L, S], one per row and head
                mask = mask.unflatten(0, (-1, self.num_heads))
        if key_padding_mask is not None:
            if key_padding_mask.shape[0] != q.shape[0]:
                raise NotFoldable("key padding mask without batch")
            padding = additive(key_padding_mask)[:, None, None, :]
            mask = padding if mask is None else mask + padding
        return mask


register_layer(nn.MultiheadAttention, FoldedMultiheadAttention)
register_layer(nn.modules.linear.NonDynamicallyQuantizableLinear, FoldedLinear)
