"""How far the fold may be from the loop."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from fastens.device import convolution_precision, on_gpu, product_precision

# The largest error of the fold against the loop, relative to the largest magnitude of the loop's output. Both do the
# same arithmetic in another order; a network of some hundred layers adds up a few hundred rounding errors.
_OF_REAL = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_OF_COMPLEX = {x.to_complex(): _OF_REAL[x] for x in (torch.float64, torch.float32, torch.float16)}
TOLERANCE = _OF_REAL | _OF_COMPLEX
HALVES = (torch.float16, torch.bfloat16)
_ROUNDINGS = 4  # of a fold and of a member, each as far from the exact answer, and by another input's chance
TOLERANCE_TF32 = 1e-2  # GPU convolutions round their operands to 10 bits unless told otherwise


def tolerance_for(tensor: Tensor, parameters: Iterable[Tensor] = ()) -> float:
    """The tolerance for one output of a network, which computes no more exactly than its parameters are."""
    tf32 = on_gpu(tensor) and "tf32" in (convolution_precision(), product_precision())
    tolerances = {**TOLERANCE, torch.float32: TOLERANCE_TF32} if tf32 else TOLERANCE
    weights = (tolerances.get(parameter.dtype, 0.0) for parameter in parameters)
    return max([tolerances[tensor.dtype], *weights]) if tensor.dtype in tolerances else 0.0


def rounding_tolerance(half: Tensor, single: Tensor) -> float:
    """The tolerance for one output in half precision: some times what its own rounding changes, or its last bits.

    Args:
        half: a member's output.
        single: the same on the same weights in float32.
    """
    rounding = relative_error(half.to(single.dtype), single)
    if not math.isfinite(rounding):  # beyond its largest number
        return TOLERANCE[half.dtype]
    return _ROUNDINGS * max(rounding, torch.finfo(half.dtype).eps)


def beyond_rounding(
    ours: list[Tensor], theirs: list[Tensor], parameters: Sequence[Tensor], exact: Callable[[], list[Tensor] | None]
) -> float | None:
    """The first error of outputs of a network that is more than rounding, none where none is.

    Args:
        ours: what a plan or a fold gave.
        theirs: what a member gave.
        parameters: of the network whose outputs they are.
        exact: gives what the member gives in float32, none where it takes no other precision; asked where an error in
            half precision is more than some last bits.
    """
    single: list[Tensor] | None = None
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        error, allowed = relative_error(a, b), tolerance_for(b, parameters)
        if b.dtype in HALVES and error > _ROUNDINGS * torch.finfo(b.dtype).eps:
            single = exact() if single is None else single
            allowed = allowed if single is None else rounding_tolerance(b, single[i])
        if not error <= allowed:
            return error
    return None


def compared(x: Tensor) -> Tensor:
    """A tensor as it is compared: without derivatives, dense, and of complex numbers their two parts."""
    x = x.detach()
    x = x if x.layout is torch.strided else x.to_dense()
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Max |actual - expected| / max |expected|; inf unless shape, dtype and the places of NaN and inf are the same."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return float("inf")
    if not expected.numel():
        return 0.0
    actual, expected = compared(actual), compared(expected)
    if not expected.is_floating_point():
        return 0.0 if torch.equal(actual, expected) else float("inf")
    a, e = actual.double(), expected.double()
    finite = torch.isfinite(e)
    if not torch.equal(torch.where(finite, 0.0, a).nan_to_num(7.0), torch.where(finite, 0.0, e).nan_to_num(7.0)):
        return float("inf")
    a, e = torch.where(finite, a, 0.0), torch.where(finite, e, 0.0)
    error, scale = float((a - e).abs().max()), float(e.abs().max())
    return error if error != error else error / scale if scale else error
