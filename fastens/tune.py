"""Measuring, ahead of use, which way of each op is the fastest for an ensemble's shapes on this device."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastens.device import device_of
from fastens.files import write_json
from fastens.ops._choice import CHOICES, Choice

Call = tuple[Choice, tuple[Any, ...]]


@contextmanager
def observed() -> Iterator[dict[tuple[str, str], Call]]:
    """Collect the different calls of ops that have several ways, taking the default way for each meanwhile.

    Yields:
        (op, key) -> the choice and its arguments, tensors on the meta device: shapes, strides and dtypes alone.
    """
    calls: dict[tuple[str, str], Call] = {}

    def observe(choice: Choice, arguments: Any) -> None:
        sizes = tuple(_without_memory(x) for x in arguments)
        calls.setdefault((choice.op, choice.key(*arguments)), (choice, sizes))

    for choice in CHOICES.values():
        choice.observer = observe
    try:
        yield calls
    finally:
        for choice in CHOICES.values():
            choice.observer = None


@torch.no_grad()
def calls_of(ensemble: Any, batches: Iterable[int]) -> dict[tuple[str, str], Call]:
    """The calls of one evaluation of diffusers members at each batch size, images with their channels last."""
    size, channels = ensemble.config.sample_size, ensemble.config.in_channels
    shape = (channels, *((size, size) if isinstance(size, int) else size))
    with observed() as calls:
        for batch in batches:
            x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))
            x = x.to(ensemble.device, ensemble.dtype)
            ensemble(x.contiguous(memory_format=torch.channels_last), torch.zeros(batch, device=ensemble.device))
    return calls


@torch.no_grad()
def tune(
    calls: dict[tuple[str, str], Call],
    device: torch.device,
    bar: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> int:
    """Measure the calls that the table does not know yet; each is kept as soon as it is known, so this can be resumed.

    Args:
        calls: from :func:`observed`.
        device: where to measure.
        bar: wraps what is iterated over, e.g. in a progress bar.

    Returns:
        How many were measured.
    """
    name = device_of(device).name
    unknown = [
        call for (op, key), call in calls.items() if call[0].table.find(name, op, key) is None and len(call[0].ways) > 1
    ]
    for choice, arguments in bar(unknown):
        choice.measure(tuple(_with_memory(x, device) for x in arguments), device)
        choice.forget()
    return len(unknown)


def export(path: pathlib.Path, device: torch.device) -> int:
    """Write this device's measurements, as the package ships them (``fastens/ops/measured/<device>.json``).

    Returns:
        How many measurements.
    """
    name = device_of(device).name
    tables = {id(choice.table): choice.table for choice in CHOICES.values()}
    ops: dict[str, Any] = {}
    for table in tables.values():
        ops.update(table.content.get(name, {}))
    write_json(path, {name: ops}, sort_keys=True)
    return sum(map(len, ops.values()))


def _without_memory(x: Any) -> Any:
    return x.detach().to("meta") if isinstance(x, Tensor) and x.is_floating_point() else x


def _with_memory(x: Any, device: torch.device) -> Any:
    """Return normal numbers of the same shape and layout; tensors that are not floating-point stay as they are."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    values = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).normal_()
    if x.ndim == 4 and x.shape[-1] == 2:  # moments, it may be, whose sums of squares have no sign: a norm would be NaN
        values[..., 1].abs_()
    return values
