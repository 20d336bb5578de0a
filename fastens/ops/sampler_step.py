"""One step of a sampler in one pass, with noise from counters."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastens.ops._dispatch import Op
from fastens.ops.normal import check_offset, number_on
from fastens.reference import sampler_step as reference

KINDS = ("linear", "clipped", "data", "corrected")

_step = Op(
    "sampler_step(Tensor x, Tensor output, Tensor? second, Tensor row, str kind, float low, float high, Tensor? seed, "
    "Tensor? offset, Tensor? samples) -> Tensor",
    reference.sampler_step,
    {"triton": lambda x, *_: torch.empty_like(x, memory_format=torch.contiguous_format)},
)


def sampler_step(
    x: Tensor,
    output: Tensor,
    row: Tensor,
    kind: str = "linear",
    *,
    second: Tensor | None = None,
    clip: Sequence[float] = (),
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
    samples: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Go from one state of a sampler to the next.

    ``linear``: r0 x + r1 output. ``clipped``: r0 x + r1 data with data = clamp(r3 x + r4 output), and ``data``: that
    alone. ``corrected``: r2 x + r3 output + r4 second. With ``samples``, all but ``corrected`` add r2 times noise that
    is drawn on the way, as :func:`fastens.ops.normal.normal` draws it.

    Args:
        x: the state, [B, ...], floating point.
        output: of the network, [B, ...]; its dtype may be another.
        row: [5], the step's coefficients r0 to r4, of the dtype of x.
        kind: one of KINDS.
        second: of ``corrected``: what the network gave in the end, [B, ...].
        clip: of ``clipped`` and ``data``: the least and the largest value.
        seed: of the noise, 64 bits, or int64 [].
        offset: which draw this is, 32 bits, or int64, one or [B].
        samples: numbers of the samples, int64 [B]; none for no noise.
        backend: the code that runs it.

    Returns:
        [B, ...], of the dtype of x.

    Raises:
        ValueError: an unknown kind, shapes or dtypes that do not fit, or what a kind needs is missing or of another.
    """
    if kind not in KINDS:
        raise ValueError(f"sampler_step: kind {kind!r} is unknown, expected one of {', '.join(map(repr, KINDS))}")
    if not x.is_floating_point() or tuple(row.shape) != (5,) or row.dtype != x.dtype:
        raise ValueError(f"sampler_step: x is {x.dtype} and row {row.dtype} {list(row.shape)}, expected that dtype [5]")
    for name, tensor in (("output", output), ("second", second)):
        if tensor is not None and tensor.shape != x.shape:
            raise ValueError(f"sampler_step: {name} is {list(tensor.shape)}, expected {list(x.shape)}")
    if (second is not None) != (kind == "corrected"):
        raise ValueError(f"sampler_step: second is of 'corrected', which needs it, and kind is {kind!r}")
    if len(clip) != (2 if kind in ("clipped", "data") else 0):
        raise ValueError(f"sampler_step: clip is {list(clip)}, expected two numbers for 'clipped' and 'data' alone")
    if samples is not None:
        if seed is None or offset is None or kind == "corrected":
            raise ValueError("sampler_step: samples need seed and offset, and a kind other than 'corrected'")
        if tuple(samples.shape) != (len(x),) or samples.dtype != torch.int64:
            raise ValueError(
                f"sampler_step: samples is {samples.dtype} {list(samples.shape)}, expected int64 [{len(x)}]"
            )
        seed, offset = (number_on(n, x.device) for n in (seed, offset))
        check_offset("sampler_step", offset, samples)
    elif seed is not None or offset is not None:
        raise ValueError("sampler_step: seed or offset without samples, expected all three for noise, or none")
    tensors = [x] if second is None else [x, second]
    low, high = clip or (0.0, 0.0)
    return _step.resolve(backend, [*tensors, output])(x, output, second, row, kind, low, high, seed, offset, samples)
