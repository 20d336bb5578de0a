"""Arguments of a call: noisy batches, times in every form, contexts, and layouts that a caller may pass."""

from dataclasses import dataclass
from random import Random
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from tests.fuzz.networks import INTEGER, LEVELS, Network, data_channels
from tests.fuzz.registry import CHANNELS_FIRST

TIMES = ("rows", "common", "number", "expanded")
LAYOUTS = ("plain", "strided", "transposed", "expanded", "chunk", "channels_last", "offset", "parameter", "negative")


@dataclass(frozen=True)
class Form:
    """How a call is made."""

    rows: int
    time: str = "rows"
    layout: str = "plain"
    context: str = "position"  # or keyword, or left out
    flip: int = 0
    gain: float = 1.0


Call = tuple[tuple[Any, ...], dict[str, Any]]


def batch(spec: Network, rows: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Noise in the shape of the network's input."""
    places = {"vector": 0, "sequence": 1, "signal": 1, "image": 2, "volume": 3}[spec.frame]
    space, c = (spec.size,) * places, data_channels(spec)
    shape = (c, *space) if spec.frame in CHANNELS_FIRST else (*space, c)
    x = torch.randn(rows, *shape, generator=generator, dtype=torch.float64).to(dtype)
    return x.transpose(0, 1).contiguous() if spec.batch_second else x


def laid_out(x: Tensor, layout: str, dim: int) -> Tensor:
    """The same values, or rows repeated, in another layout."""
    if layout == "strided":
        wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "expanded" and x.shape[dim]:
        return x.narrow(dim, 0, 1).expand_as(x)
    if layout == "chunk":
        return torch.cat([x, x + 1], dim).chunk(2, dim)[0]
    if layout == "parameter":
        return torch.nn.Parameter(x)
    if layout == "negative":
        return torch._neg_view(-x)  # as the imaginary part of a conjugate is
    if layout == "channels_last" and x.ndim == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "offset":
        flat = torch.zeros(x.numel() + 1, dtype=x.dtype)
        flat[1:] = x.reshape(-1)
        return flat[1:].view(x.shape)
    return x


def make_call(spec: Network, form: Form, seed: int, dtype: torch.dtype) -> Call:
    """Arguments and keyword arguments of one call."""
    generator = torch.Generator().manual_seed(seed)
    x = batch(spec, form.rows, generator, dtype)
    args: list[Any] = [laid_out(x, form.layout, int(spec.batch_second))]
    args.append(_time(spec, form, generator, dtype))
    kwargs: dict[str, Any] = {}
    context = _context(spec, form, generator, dtype)
    if context is not None and form.context == "position":
        args.append(context)
    elif context is not None:
        kwargs["context"] = context
    if form.flip:
        kwargs["flip"] = form.flip
    if form.gain != 1.0:
        kwargs["gain"] = form.gain
    return tuple(args), kwargs


def _time(spec: Network, form: Form, generator: torch.Generator, dtype: torch.dtype) -> Any:
    count = max(form.rows, 1)  # an empty batch has a time, too
    if spec.time in INTEGER:
        t = torch.randint(0, LEVELS - 1, (count,), generator=generator)
    else:
        t = torch.rand(count, generator=generator, dtype=torch.float64).to(dtype)
    if form.time == "common":
        return t[0].clone()
    if form.time == "number":
        return t[0].item()
    return t[:1].expand(form.rows) if form.time == "expanded" else t[: form.rows]


def _context(spec: Network, form: Form, generator: torch.Generator, dtype: torch.dtype) -> Any:
    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    if spec.context == "none" or form.context == "absent":
        return None
    if spec.context == "same":
        return batch(spec, form.rows, generator, dtype)
    if spec.context == "labels":
        return torch.randint(0, LEVELS, (form.rows,), generator=generator)
    if spec.context == "mask":
        return torch.rand(form.rows, generator=generator) > 0.3
    if spec.context == "pair":
        return noise(form.rows, spec.width), noise(form.rows, spec.width)
    if spec.context == "named":
        return {"text": noise(form.rows, spec.width), "size": noise(form.rows, 2)}
    if spec.context == "bank":  # the same for all rows, and perhaps as many entries as rows
        return noise(spec.rows, spec.width)
    return noise(form.rows, 3, spec.width) if spec.context == "tokens" else noise(form.rows, spec.width)


def draw_form(spec: Network, draw: Random, rows: int | None = None) -> Form:
    """A form as callers have it: mostly plain."""
    return Form(
        rows=spec.rows if rows is None else rows,
        time=draw.choices(TIMES, [5, 1, 1, 1])[0],
        layout=draw.choices(LAYOUTS, [12, 1, 1, 1, 1, 1, 1, 0.3, 0.3])[0],
        context=draw.choices(("position", "keyword", "absent"), [4, 2, 1])[0],
        flip=draw.choices((0, 1, 2), [6, 1, 1])[0],
        gain=draw.choices((1.0, 0.5, 2.0), [6, 1, 1])[0],
    )


def copied(call: Call) -> Call:
    """The same arguments in memory of their own."""
    return pytree.tree_map(lambda a: a.detach().clone() if isinstance(a, Tensor) else a, call)
