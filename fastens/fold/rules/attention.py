"""Attention: of all rows at once."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastens.fold.dispatch import RANDOM, Fold, dispatch
from fastens.fold.names import named
from fastens.fold.nested import leaves_of, mapped, plain
from fastens.fold.slices import entry_by_entry
from fastens.fold.tensor import NotFoldable, member_valued

_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def scaled_dot_product(fold: Fold, func: Any, *args: Any, **kwargs: Any) -> Any:
    """``softmax(q k^T) v``; dropped weights are each member's own."""
    bound = dict(zip(_NAMES, args, strict=False)) | kwargs
    q, k, v, mask = (bound.pop(name, None) for name in _NAMES[:4])
    p = bound.get("dropout_p", 0.0)
    if p and fold.dropouts.masked:
        return fold.dropouts.attention(fold, q, k, v, mask, bound)
    if not any(map(member_valued, (q, k, v, mask))):
        if p:
            q = fold.wrap(fold.entries(q).contiguous())
        else:
            return fold.common(func(plain(q), plain(k), plain(v), plain(mask), **bound))
    if any(x.ndim != q.ndim for x in (k, v)) or (mask is not None and mask.ndim > q.ndim):
        return entry_by_entry(fold, func, (q, k, v, mask), bound)
    if q.ndim < 3:
        return fold.wrap(
            func(*(fold.entries(x) for x in (q, k, v)), None if mask is None else fold.entries(mask), **bound)
        )
    lead = q.shape[0]
    if any(x.shape[0] not in (1, lead) for x in (k, v)):
        return entry_by_entry(fold, func, (q, k, v, mask), bound)
    q, k, v = (x if x.shape[0] == lead else fold.again(Tensor.expand, x, lead, *x.shape[1:]) for x in (q, k, v))
    if fold.recording and bound.pop("enable_gqa", False):
        k, v = (_for_each_head(fold, x, q.shape[-3]) for x in (k, v))
    if mask is not None:
        mask = plain(mask)
        own = member_valued(mask) or (mask.ndim == q.ndim and mask.shape[0] != 1)
        if own:
            missing = q.ndim - mask.ndim
            mask = fold.again(Tensor.reshape, mask, (1,) * missing + tuple(mask.shape)) if missing else mask
            mask = mask if mask.shape[0] == lead else fold.again(Tensor.expand, mask, lead, *mask.shape[1:])
            mask = fold.rows(mask)
    return fold.unrows(func(fold.rows(q), fold.rows(k), fold.rows(v), mask, **bound))


RANDOM[F.scaled_dot_product_attention] = scaled_dot_product


def _for_each_head(fold: Fold, x: Any, heads: int) -> Any:
    """Keys or values of groups of heads, which plans do not know, as those of each head."""
    times = heads // x.shape[-3]
    return x if times == 1 else fold.again(Tensor.repeat_interleave, x, times, -3)


def multi_head(
    fold: Fold, func: Any, query: Any, key: Any, value: Any, embed_dim_to_check: int, num_heads: int,
    in_proj_weight: Any, in_proj_bias: Any, bias_k: Any, bias_v: Any, add_zero_attn: bool, dropout_p: float,
    out_proj_weight: Any, out_proj_bias: Any, training: bool = True, key_padding_mask: Any = None,
    need_weights: bool = True, attn_mask: Any = None, use_separate_proj_weight: bool = False,
    q_proj_weight: Any = None, k_proj_weight: Any = None,
    v_proj_weight: Any = None, static_k: Any = None, static_v: Any = None, average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Any:  # fmt: skip
    """``nn.MultiheadAttention``, whose function hands itself over whole: projections, heads, attention.

    Inputs are [tokens, B, width], as the function takes them.
    """
    given = (query, key, value, in_proj_weight, out_proj_weight, q_proj_weight, attn_mask, key_padding_mask)
    masked = fold.dropouts.masked
    drops = dropout_p > 0 and (training or masked)
    if not drops and not any(map(member_valued, given)):
        return NotImplemented
    special = bias_k is not None or bias_v is not None or add_zero_attn or static_k is not None or static_v is not None
    if special or query.ndim != 3:
        if masked and drops:
            raise NotFoldable("MC Dropout: attention with extra key and value rows is not masked")
        return NotImplemented

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        return dispatch(fold, function, args, kwargs)

    width = query.shape[2]
    parts = []
    for i, x in enumerate((query, key, value)):
        bias = (
            None if in_proj_bias is None else call(Tensor.__getitem__, in_proj_bias, slice(i * width, (i + 1) * width))
        )
        if use_separate_proj_weight:
            weight = (q_proj_weight, k_proj_weight, v_proj_weight)[i]
        else:
            weight = call(Tensor.__getitem__, in_proj_weight, slice(i * width, (i + 1) * width))
        projected = call(F.linear, call(Tensor.transpose, x, 0, 1), weight, bias)  # [B, tokens, width]
        heads = call(Tensor.unflatten, projected, -1, (num_heads, -1))
        parts.append(call(Tensor.transpose, heads, 1, 2))  # [B, heads, tokens, head width]
    q, k, v = parts
    causal = is_causal and key_padding_mask is None and not need_weights
    if causal:
        attn_mask = None  # which torch believes to be the causal one
    mask = _mask(call, attn_mask, key_padding_mask, q, num_heads)
    p = dropout_p if drops else 0.0
    weights = None
    if need_weights:
        scores = call(torch.mul, call(torch.matmul, q, call(Tensor.transpose, k, -2, -1)), 1 / math.sqrt(q.shape[-1]))
        scores = scores if mask is None else call(torch.add, scores, mask)
        weights = call(torch.softmax, scores, -1)
        weights = call(F.dropout, weights, p, True) if p else weights
        attended = call(torch.matmul, weights, v)
        weights = call(Tensor.mean, weights, 1) if average_attn_weights else weights
    else:
        attended = call(F.scaled_dot_product_attention, q, k, v, mask, p, causal)
    joined = call(Tensor.flatten, call(Tensor.transpose, attended, 1, 2), 2)
    output = call(F.linear, joined, out_proj_weight, out_proj_bias)
    return call(Tensor.transpose, output, 0, 1), weights


def _mask(call: Any, attn_mask: Any, key_padding_mask: Any, q: Any, num_heads: int) -> Any:
    """Both masks as one that is added to the scores."""

    def additive(mask: Any) -> Any:
        if mask.dtype != torch.bool:
            return mask
        zeros = torch.zeros(mask.shape, dtype=q.dtype, device=q.device)
        return call(torch.where, mask, float("-inf"), zeros)

    mask = None
    if attn_mask is not None:
        mask = additive(attn_mask)
        if mask.ndim == 3:  # [B * heads, queries, keys]
            mask = call(Tensor.unflatten, mask, 0, (-1, num_heads))
    if key_padding_mask is not None:
        padding = call(Tensor.__getitem__, additive(key_padding_mask), (slice(None), None, None))
        mask = padding if mask is None else call(torch.add, mask, padding)
    return mask


def multi_head_or_whole(fold: Fold, func: Any, *args: Any, **kwargs: Any) -> Any:
    """The function's parts where it differs between members, else as it is."""
    found = multi_head(fold, func, *args, **kwargs)
    if found is not NotImplemented:
        return found
    if any(map(member_valued, leaves_of((args, kwargs)))):
        return entry_by_entry(fold, func, args, kwargs)
    return fold.common(func(*mapped(plain, args), **mapped(plain, kwargs)))


RANDOM[F.multi_head_attention_forward] = multi_head_or_whole


def left_aligned(fold: Fold, func: Any, *args: Any, **kwargs: Any) -> bool:
    """What ``nn.TransformerEncoder`` asks before it leaves padded places out, where it does not differentiate."""
    if fold.network is not None and torch.is_grad_enabled() and any(p.requires_grad for p in fold.network.parameters()):
        return False
    raise NotFoldable("nn.TransformerEncoder leaves padded places out (enable_nested_tensor=False keeps them)")


RANDOM.update(dict.fromkeys(named("_nested_tensor_from_mask_left_aligned"), left_aligned))
