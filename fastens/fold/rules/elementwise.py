"""Functions of elements, and broadcasting: on the stacks, aligned from the right."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastens.fold.dispatch import Fold, rule
from fastens.fold.names import named
from fastens.fold.nested import leaves_of, mapped, plain
from fastens.fold.tensor import MemberTensor, NotFoldable, member_valued, memory_of
from fastens.fold.writes import writes_to

NAMES = """
    abs absolute acos acosh add addcdiv addcmul angle asin asinh atan atan2 atanh bitwise_and bitwise_not bitwise_or
    bitwise_xor ceil celu clamp clamp_max clamp_min clip conj copysign cos cosh deg2rad detach digamma div divide elu eq
    erf erfc erfinv exp exp2 expm1 float_power floor floor_divide fmax fmin fmod frac ge gelu greater greater_equal
    gt hardshrink hardsigmoid hardswish hardtanh heaviside hypot i0 isclose isfinite isinf isnan isneginf isposinf ldexp
    le leaky_relu lerp less less_equal lgamma log log10 log1p log2 logaddexp logaddexp2 logical_and logical_not
    logical_or logical_xor logit logsigmoid lt masked_fill maximum minimum mish mul multiply mvlgamma nan_to_num ne neg
    negative nextafter not_equal polygamma positive pow rad2deg real imag reciprocal relu relu6 remainder round rrelu
    rsqrt rsub selu sgn sigmoid sign signbit silu sin sinc sinh softplus softshrink softsign sqrt square sub subtract
    tan tanh tanhshrink threshold true_divide trunc fix xlogy where complex polar
    to cpu cuda type type_as float double half bfloat16 int long bool short clone contiguous zero_ fill_ copy_
    __and__ __or__ __xor__ __rand__ __ror__ __rxor__ __rpow__ __rsub__ __rdiv__ __rtruediv__ __rfloordiv__ __rmod__
    __radd__ __rmul__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__ __neg__ __pos__ __abs__ __invert__ __pow__ __add__
    __sub__ __mul__ __truediv__ __div__ __floordiv__ __mod__ __idiv__
    __iadd__ __isub__ __imul__ __itruediv__ __ifloordiv__ __imod__ __ipow__ __iand__ __ior__ __ixor__
    zeros_like ones_like full_like empty_like
"""
_IN_PLACE = " ".join(f"{name}_" for name in NAMES.split() if not name.endswith("_") and name != "detach")
_LAYOUTS = {torch.contiguous_format: None, torch.preserve_format: None}


@rule(*named(NAMES), *named(_IN_PLACE))
def elementwise(fold: Fold, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Run the function on the stacks."""
    if func is Tensor.type and len(args) == 1 and not kwargs:  # the name of its type, as a member's
        return func(fold.stack(args[0]))
    if any(isinstance(leaf, torch.memory_format) and leaf not in _LAYOUTS for leaf in leaves_of((args, kwargs))):
        return _laid_out(fold, func, args, kwargs)
    if func in _TAKES_OTHER and isinstance(kwargs.get("other"), Tensor):
        args, kwargs = (*args, kwargs["other"]), {name: value for name, value in kwargs.items() if name != "other"}
    if func in _TAKES_OTHER and len(args) > 1 and isinstance(args[1], Tensor):
        return _converted(fold, func, args, kwargs)
    tensors = [leaf for leaf in leaves_of((args, kwargs)) if isinstance(leaf, Tensor)]
    if func in _CLAMPS and len(tensors) > 1 and (torch.is_grad_enabled() or _has_numbers(args[1:], kwargs)):
        return NotImplemented  # torch broadcasts no limits where it differentiates, nor a tensor against a number
    if func in _UNLIKE and (len(tensors) == 1 or (member_valued(tensors[-1]) and func in _FILLS)):
        return NotImplemented
    writes = writes_to(func, args, kwargs)
    target: Any = next(iter(args), None)
    if func is Tensor.fill_ and len(tensors) > 1:
        return fold.again(Tensor.copy_, target, tensors[1])
    ndim = max(x.ndim for x in tensors)
    if writes and ndim > target.ndim:
        raise NotFoldable("an operation in place broadcasts what it writes to")
    align, back = None, fold.unrows
    if fold.recording:
        align = _aligned_rows(fold, [target] if writes else tensors, tensors)
    if align is None:
        align, back = _aligned_stacks(fold, ndim), fold.wrap
    dtype = None if func in _OF_DOUBLES else _promoted(tensors)
    cast = align if dtype is None else lambda x: align(x).to(dtype) if x.dtype != torch.bool else align(x)
    if writes:
        rest, named_rest = mapped(cast, (args[1:], kwargs))
        func(align(target), *rest, **named_rest)
        return target
    own_args, own_kwargs = mapped(cast, (args, kwargs))
    made = func(*own_args, **own_kwargs)
    if made is NotImplemented:  # by an operator, of what is no number: Python asks the other side
        return made
    if made is next(iter(own_args), None) and member_valued(target):  # which a member's code gets back itself
        return target
    if func in _MAY_ALIAS and member_valued(target):
        return _maybe_itself(fold, func, target, made, back, args[1:], kwargs)
    return back(made)


_MAY_ALIAS = set(named("detach contiguous to cpu cuda type type_as float double half bfloat16 int long bool short"))


def _maybe_itself(
    fold: Fold, func: Any, x: MemberTensor, made: Tensor, back: Any, rest: Any, kwargs: dict[str, Any]
) -> MemberTensor:
    """What a member's own tensor may be itself, or a copy: in another dtype or layout, elsewhere, or asked for."""
    stack, result = fold.stack(x), back(made)
    flags = [a for a in rest if isinstance(a, bool)]  # non_blocking, copy
    layout = next((a for a in leaves_of((rest, kwargs)) if isinstance(a, torch.memory_format)), None)
    if layout is None and func is Tensor.contiguous:
        layout = torch.contiguous_format
    is_so = layout in (None, torch.preserve_format) or (len(stack) and stack[0].is_contiguous(memory_format=layout))
    if (made.dtype, made.device) != (x.dtype, x.device) or kwargs.get("copy", any(flags[1:])) or not is_so:
        return result
    if memory_of(made) != memory_of(stack):
        return fold.copied(result.stack, stack)
    result.alias = fold.aliases(x)
    return result


def _has_numbers(*arguments: Any) -> bool:
    return any(isinstance(leaf, int | float) for leaf in leaves_of(arguments))


_CLAMPS = set(named("clamp clip clamp_ clip_"))
_TAKES_OTHER = set(named("to type_as"))
_OF_DOUBLES = set(named("float_power float_power_"))  # of whatever it is given, at its own precision
_FILLS = set(named("masked_fill masked_fill_"))
_UNLIKE = _FILLS | set(named("where"))


def _converted(fold: Fold, func: Any, args: Any, kwargs: Any) -> Any:
    """``x.to(other)`` takes the dtype and device of the other tensor, and nothing of its values."""
    x, other, *rest = args
    other = fold.stack(other) if member_valued(other) else plain(other)
    if member_valued(x):
        stack = fold.stack(x)
        made = func(stack, other, *rest, **kwargs)
        if made is stack:
            return x
        return _maybe_itself(fold, func, x, made, fold.wrap, rest, kwargs)
    return fold.common(func(plain(x), other, *rest, **kwargs))


def _aligned_stacks(fold: Fold, ndim: int) -> Any:
    """What makes a tensor one of ``ndim`` dimensions behind the hidden one; common ones broadcast as they are."""

    def align(x: Tensor) -> Tensor:
        if not member_valued(x):
            return plain(x)
        stack = fold.stack(x)
        missing = ndim + 1 - stack.ndim
        return stack if not missing else stack[(slice(None), *(None,) * missing)]

    return align


def _aligned_rows(fold: Fold, kept: Any, tensors: list[Tensor]) -> Any:
    """The same with the hidden dimension folded into the first, as plans see tensors.

    None where there is no first dimension, or one of ``kept``, which must be seen and not copied, has it elsewhere.
    """
    ndim = max(x.ndim for x in tensors)
    if not ndim:
        return None
    if (len(tensors) == 1 or kept is not tensors) and not all(_flattens(fold.stack(x)) for x in kept):
        return None
    lead = next((x.shape[0] for x in tensors if x.ndim == ndim and x.shape[0] != 1), 1)

    def align(x: Tensor) -> Tensor:
        if not member_valued(x):
            x = plain(x)
            if x.ndim < ndim or x.shape[0] == 1:
                return x
            return x.repeat(fold.hidden.size, *(1,) * (ndim - 1))
        if x.ndim == ndim and x.shape[0] == lead:
            return fold.rows(x)
        stack = fold.stack(x)
        missing = ndim + 1 - stack.ndim
        stack = stack if not missing else stack[(slice(None), *(None,) * missing)]
        if stack.shape[1] != lead:
            stack = stack.expand(stack.shape[0], lead, *stack.shape[2:])
        return stack.flatten(0, 1)

    return align


def _flattens(stack: Tensor) -> bool:
    return stack.shape[1] == 1 or stack.shape[0] == 1 or stack.stride(0) == stack.shape[1] * stack.stride(1)


def _promoted(tensors: list[Tensor]) -> torch.dtype | None:
    """The dtype that a member's tensors have together, where the stacks would have another.

    A member's tensor of no dimension gives way to the others as a number does; its stack has a dimension.
    """
    if len(tensors) < 2 or all(x.dtype == tensors[0].dtype for x in tensors):
        return None
    if not any(member_valued(x) and x.ndim == 0 for x in tensors):
        return None
    wanted = result_type([torch.empty((1,) * min(x.ndim, 1), dtype=x.dtype) for x in tensors])
    found = result_type([torch.empty((1,) * min(x.ndim + member_valued(x), 1), dtype=x.dtype) for x in tensors])
    return None if wanted == found else wanted


def result_type(tensors: list[Tensor]) -> torch.dtype:
    """The dtype that tensors have together, one dimension or none of each told."""
    tensors = [x for x in tensors if x.dtype != torch.bool] or tensors
    first, *others = tensors
    for other in others:
        first = torch.empty((1,) * max(first.ndim, other.ndim), dtype=torch.result_type(first, other))
    return first.dtype


def _laid_out(fold: Fold, func: Any, args: Any, kwargs: Any) -> Any:
    """Copies and conversions to a memory format, which is one of a member's dimensions."""
    x = args[0]
    wanted = next(leaf for leaf in leaves_of((args, kwargs)) if isinstance(leaf, torch.memory_format))
    expected = {torch.channels_last: 4, torch.channels_last_3d: 5}[wanted]
    if x.ndim != expected or not member_valued(x):
        return NotImplemented
    rest, named_rest = mapped(lambda y: fold.stack(y) if member_valued(y) else plain(y), (args[1:], kwargs))
    made = func(fold.rows(x), *rest, **named_rest)
    return _maybe_itself(fold, func, x, made, fold.unrows, rest, kwargs) if func in _MAY_ALIAS else fold.unrows(made)


@rule(F.prelu, torch.prelu, Tensor.prelu, own_op=True)  # autocast knows it, and not the functions that it is made of
def prelu(fold: Fold, func: Any, input: Any, weight: Any) -> Any:
    """One slope, or one for each channel, below zero."""
    slope = weight
    if weight.numel() > 1 and input.ndim > 1:
        slope = fold.again(Tensor.reshape, weight, (1, -1, *(1,) * (input.ndim - 2)))
    elif input.ndim == 0:
        slope = fold.again(Tensor.reshape, weight, ())
    scaled = fold.again(torch.mul, input, slope)
    return fold.again(torch.where, fold.again(torch.gt, input, 0), input, scaled)


@rule(Tensor.requires_grad_)
def requires_grad_(fold: Fold, func: Any, x: MemberTensor, requires_grad: bool = True) -> MemberTensor:
    """Ask for gradients of the stack."""
    fold.stack(x).requires_grad_(requires_grad)
    x.flat = None
    return x


@rule(*named("detach_"))
def detach_(fold: Fold, func: Any, x: MemberTensor) -> MemberTensor:
    """The same values, to which no graph leads; torch's own refuses stacks that are views."""
    x.become(fold.stack(x).detach(), fold.hidden)
    return x
