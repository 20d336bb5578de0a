"""Functions that move dimensions, cut and join: the same behind the hidden dimension."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastens.fold.dispatch import Fold, rule
from fastens.fold.names import named
from fastens.fold.nested import plain
from fastens.fold.tensor import MemberTensor, NotFoldable, getters, member_valued, memory_of


def behind(dim: int, ndim: int) -> int:
    """A member's dimension as one of the stack's.

    Raises:
        IndexError: a member has no such dimension.
    """
    least = max(ndim, 1)
    if not -least <= dim < least:
        raise IndexError(f"Dimension out of range (expected to be in range of [{-least}, {least - 1}], but got {dim})")
    return dim % least + 1


def _sizes(given: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(given[0]) if len(given) == 1 and not isinstance(given[0], int | torch.SymInt) else given


@rule(*named("view reshape view_as reshape_as"))
def reshape(fold: Fold, func: Any, x: Any, *shape: Any, **kwargs: Any) -> Any:
    """Another shape, or another dtype, of the same elements."""
    if "dtype" in kwargs or (shape and isinstance(shape[0], torch.dtype)):
        return fold.wrap(func(fold.stack(x), *shape, **kwargs)) if x.ndim else NotImplemented
    shape = (next(iter(kwargs.values())),) if kwargs else shape  # shape, size or other
    if isinstance(shape[0], Tensor):
        shape = (shape[0].shape,)
    sizes = _sizes(shape)
    if not member_valued(x):
        return fold.common(plain(x).reshape(sizes))
    if sizes.count(-1) == 1:
        known = 1
        for n in sizes:
            known *= n if n != -1 else 1
        if known:
            sizes = tuple(x.numel() // known if n == -1 else n for n in sizes)
    product = 1
    for n in sizes:
        product *= n
    if product != x.numel():
        raise RuntimeError(f"shape '{list(sizes)}' is invalid for input of size {x.numel()}")
    stack = fold.stack(x)
    if fold.recording and sizes and x.ndim and sizes[0] == x.shape[0]:  # in the form that plans know
        return fold.unrows(fold.rows(x).reshape(-1 if sizes[0] else 0, *sizes[1:])) if sizes[0] else NotImplemented
    out = stack.reshape(len(stack), *sizes)
    copied = memory_of(out) != memory_of(stack)
    views = getattr(func, "__name__", "").startswith("view")  # where a member's own tensor would have been seen
    if copied and views and not fold.recording:
        return fold.copied(out, stack)
    return fold.wrap(out, copied or fold.aliases(x))


@rule(*named("flatten unflatten"), torch.unflatten)
def flattened(fold: Fold, func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Dimensions merged or split; by shape, which is what they do."""
    shell = torch.empty(x.shape, device="meta")
    return reshape(fold, Tensor.reshape, x, tuple(func(shell, *args, **kwargs).shape))


@rule(*named("permute"))
def permute(fold: Fold, func: Any, x: Any, *dims: Any, **kwargs: Any) -> Any:
    """Dimensions in another order."""
    dims = _sizes((kwargs["dims"],) if "dims" in kwargs else dims)
    return fold.wrap(fold.stack(x).permute(0, *(behind(d, x.ndim) for d in dims)), fold.aliases(x))


@rule(*named("transpose swapaxes swapdims movedim moveaxis"))
def moved(fold: Fold, func: Any, x: Any, *dims: Any, **kwargs: Any) -> Any:
    """Dimensions exchanged or moved."""
    if not x.ndim:
        return NotImplemented

    def shift(dim: Any) -> Any:
        return behind(dim, x.ndim) if isinstance(dim, int) else [behind(d, x.ndim) for d in dim]

    named_dims = {name: shift(value) for name, value in kwargs.items()}
    return fold.wrap(func(fold.stack(x), *map(shift, dims), **named_dims), fold.aliases(x))


@rule(*named("t"), *getters("T mT H mH"), *named("adjoint"))
def turned(fold: Fold, func: Any, x: Any) -> Any:
    """The last two dimensions exchanged; all of them reversed by ``T``."""
    name = getattr(getattr(func, "__self__", None), "__name__", "")
    stack = fold.stack(x)
    if name == "T" or getattr(func, "__name__", "") == "t":
        return fold.wrap(stack.permute(0, *range(stack.ndim - 1, 0, -1)), fold.aliases(x))
    if name in ("mT", "mH"):
        return fold.wrap(func(stack), fold.aliases(x))
    return fold.wrap(stack.mH, fold.aliases(x)) if x.ndim == 2 else NotImplemented


@rule(*named("unsqueeze"))
def unsqueeze(fold: Fold, func: Any, x: Any, dim: int) -> Any:
    """A dimension of one more."""
    return fold.wrap(fold.stack(x).unsqueeze(behind(dim, x.ndim + 1)), fold.aliases(x))


@rule(*named("squeeze"))
def squeeze(fold: Fold, func: Any, x: Any, dim: Any = None) -> Any:
    """Without dimensions of one."""
    dims = range(x.ndim) if dim is None else (dim,) if isinstance(dim, int) else dim
    ones = [behind(d, x.ndim) for d in dims if x.ndim and x.shape[d] == 1]
    return fold.wrap(fold.stack(x).squeeze(ones) if ones else fold.stack(x).view_as(fold.stack(x)), fold.aliases(x))


@rule(*named("expand expand_as broadcast_to"))
def expand(fold: Fold, func: Any, x: Any, *sizes: Any, **kwargs: Any) -> Any:
    """Dimensions of one seen several times, and new ones in front."""
    sizes = (next(iter(kwargs.values())),) if kwargs and not sizes else sizes
    if isinstance(sizes[0], Tensor) and func.__name__ != "expand_as":
        return NotImplemented  # whose value is a size
    sizes = (sizes[0].shape,) if isinstance(sizes[0], Tensor) else sizes
    sizes = _sizes(sizes)
    if not member_valued(x):
        return fold.common(plain(x).expand(sizes))
    stack = fold.stack(x)
    stack = stack[(slice(None), *(None,) * (len(sizes) - x.ndim))]
    return fold.wrap(stack.expand(len(stack), *sizes), fold.aliases(x))


@rule(*named("broadcast_tensors"), torch.functional.broadcast_tensors)
def broadcast_tensors(fold: Fold, func: Any, *tensors: Any) -> Any:
    """Tensors seen in the shape that they have together."""
    if len(tensors) == 1 and isinstance(tensors[0], list | tuple):
        tensors = tuple(tensors[0])
    shape = torch.broadcast_shapes(*(x.shape for x in tensors))
    return tuple(fold.again(Tensor.expand, x, shape) for x in tensors)


@rule(*named("view_as_complex view_as_real"))
def complex_view(fold: Fold, func: Any, x: Any) -> Any:
    """Pairs of numbers seen as complex ones, as rotary embeddings do, and the other way round."""
    stack = fold.stack(x)
    if func.__name__ == "view_as_complex" and (x.ndim == 0 or x.shape[-1] != 2):
        return NotImplemented  # the member's own error
    if func.__name__ == "view_as_complex" and (stack.stride(0) % 2 or stack.storage_offset() % 2):
        return fold.copied(func(stack.contiguous()), stack)
    return fold.wrap(func(stack), fold.aliases(x))


@rule(*named("repeat tile"))
def repeat(fold: Fold, func: Any, x: Any, *sizes: Any, **kwargs: Any) -> Any:
    """Copies side by side."""
    sizes = _sizes(next(iter(kwargs.values())) if kwargs else sizes)
    if not member_valued(x):
        return NotImplemented
    stack, sizes = fold.stack(x), (1,) * (x.ndim - len(sizes)) + tuple(sizes)
    stack = stack[(slice(None), *(None,) * (len(sizes) - x.ndim))]
    return fold.wrap(stack.repeat(1, *sizes))


@rule(*named("chunk split split_with_sizes tensor_split unsafe_chunk unsafe_split hsplit vsplit dsplit"))
def cut(fold: Fold, func: Any, x: Any, sections: Any = None, dim: int = 0, **kwargs: Any) -> Any:
    """Parts along a dimension."""
    if sections is None and len(kwargs) == 1:  # chunks, split_size, split_sizes, indices_or_sections, ...
        sections = next(iter(kwargs.values()))
    if getattr(func, "__name__", "") in ("hsplit", "vsplit", "dsplit") or not isinstance(sections, int | list | tuple):
        return NotImplemented
    stack, dim = fold.stack(x), behind(dim, x.ndim)
    parts = (
        stack.split(sections, dim)
        if "split" in func.__name__ and "tensor" not in func.__name__
        else (func(stack, sections, dim))
    )
    return type(parts)(fold.wrap(part, fold.aliases(x)) for part in parts)


@rule(*named("unbind"), Tensor.__iter__)
def unbind(fold: Fold, func: Any, x: Any, dim: int = 0) -> Any:
    """Every entry along a dimension."""
    parts = tuple(fold.wrap(part, fold.aliases(x)) for part in fold.stack(x).unbind(behind(dim, x.ndim)))
    return iter(parts) if func is Tensor.__iter__ else parts


@rule(*named("select"))
def select(fold: Fold, func: Any, x: Any, dim: int, index: int) -> Any:
    """One entry along a dimension."""
    if not x.ndim or not isinstance(dim, int) or isinstance(index, Tensor):
        return NotImplemented
    size = x.shape[dim]
    if not -size <= index < size:
        raise IndexError(f"index {index} is out of bounds for dimension {dim} of size {size}")
    return fold.wrap(fold.stack(x).select(behind(dim, x.ndim), index), fold.aliases(x))


@rule(*named("narrow"))
def narrow(fold: Fold, func: Any, x: Any, dim: int, start: Any, length: int) -> Any:
    """Some entries along a dimension."""
    if not x.ndim or isinstance(start, Tensor):
        return NotImplemented
    return fold.wrap(fold.stack(x).narrow(behind(dim, x.ndim), start, length), fold.aliases(x))


@rule(*named("diagonal"))
def diagonal(fold: Fold, func: Any, x: Any, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Any:
    """The entries whose places along two dimensions are the same."""
    if x.ndim < 2:
        return NotImplemented
    dims = behind(dim1, x.ndim), behind(dim2, x.ndim)
    return fold.wrap(fold.stack(x).diagonal(offset, *dims), fold.aliases(x))


@rule(*getters("real imag"))
def part(fold: Fold, func: Any, x: Any) -> Any:
    """The real or imaginary parts, as views."""
    stack = fold.stack(x)
    seen = func(stack)
    return x if seen is stack else fold.wrap(seen, fold.aliases(x))


@rule(*named("ravel"))
def ravel(fold: Fold, func: Any, x: Any) -> Any:
    """All elements in a row."""
    return fold.again(Tensor.reshape, fold.again(Tensor.contiguous, x), -1)


@rule(*named("flip roll index_select repeat_interleave"))
def along(fold: Fold, func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Functions of one dimension, or of some, that are given by number."""
    name = func.__name__
    if not x.ndim:
        return NotImplemented
    if name == "flip":
        dims = _sizes((kwargs["dims"],) if kwargs else args)
        return fold.wrap(func(fold.stack(x), [behind(d, x.ndim) for d in dims]))
    if name == "roll":
        return fold.wrap(_rolled(fold.stack(x), *args, **kwargs))
    if name == "index_select" and not kwargs and member_valued(x) and not member_valued(args[1]):
        index = args[1].stack if isinstance(args[1], MemberTensor) else args[1]
        return fold.wrap(func(fold.stack(x), behind(args[0], x.ndim), index))
    if name == "repeat_interleave" and args and isinstance(args[0], int) and member_valued(x):
        times, *rest = args
        dim = kwargs.get("dim", rest[0] if rest else None)
        return NotImplemented if dim is None else fold.wrap(func(fold.stack(x), times, dim=behind(dim, x.ndim)))
    return NotImplemented


def _rolled(stack: Tensor, shifts: Any, dims: Any = ()) -> Tensor:
    """Entries moved along dimensions of what a member sees, or through all of it in a row where none is named."""
    dims = (dims,) if isinstance(dims, int) else tuple(dims)
    if not dims:
        return stack.flatten(1).roll(shifts, 1).reshape(stack.shape)
    return stack.roll(shifts, [behind(d, stack.ndim - 1) for d in dims])


def _dim_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    return kwargs.get("dim", kwargs.get("axis", args[0] if args else 0))


@rule(*named("cat concat concatenate"))
def cat(fold: Fold, func: Any, tensors: Any, *args: Any, **kwargs: Any) -> Any:
    """Joined along a dimension; common tensors are seen by every member."""
    ndim = max(x.ndim for x in tensors)
    dim = behind(_dim_of(args, kwargs), ndim)
    empty = [x.ndim == 1 and not x.numel() and ndim > 1 for x in tensors]  # torch skips them, whatever their shape
    kept = [x for x, skipped in zip(tensors, empty, strict=True) if not skipped]
    if len(kept) < len(tensors):  # their dtype counts
        dtype = functools.reduce(torch.promote_types, (x.dtype for x in tensors))
        kept = [fold.again(Tensor.to, x, dtype) for x in kept]
    if fold.recording and dim > 1 and ndim > 1:
        return fold.unrows(torch.cat([fold.rows(x) for x in kept], dim - 1))
    return fold.wrap(torch.cat([fold.entries(x) for x in kept], dim))


@rule(*named("stack"))
def stack(fold: Fold, func: Any, tensors: Any, *args: Any, **kwargs: Any) -> Any:
    """Joined along a new dimension."""
    dim = behind(_dim_of(args, kwargs), tensors[0].ndim + 1)
    if fold.recording and dim > 1:
        return fold.unrows(torch.stack([fold.rows(x) for x in tensors], dim - 1))
    return fold.wrap(torch.stack([fold.entries(x) for x in tensors], dim))


@rule(torch.nn.utils.rnn.pad_sequence, *named("pad_sequence"))
def pad_sequence(
    fold: Fold,
    func: Any,
    sequences: Any,
    batch_first: bool = False,
    padding_value: float = 0.0,
    padding_side: str = "right",
) -> Any:
    """Sequences of several lengths as one tensor."""
    longest = max(x.shape[0] for x in sequences)
    padded = []
    for x in sequences:
        missing = longest - x.shape[0]
        ends = (missing, 0) if padding_side == "left" else (0, missing)
        whole = (*(0,) * (2 * x.ndim - 2), *ends)
        padded.append(fold.again(F.pad, x, whole, value=padding_value) if missing else x)
    return fold.again(torch.stack, padded, 0 if batch_first else 1)


@rule(*named("unsqueeze_ squeeze_ t_ transpose_ swapaxes_ swapdims_"))
def in_place(fold: Fold, func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """The same tensor with other dimensions."""
    x.become(fold.again(getattr(Tensor, func.__name__[:-1]), x, *args, **kwargs).stack, x.hidden)
    return x


@rule(*named("pad"), torch.constant_pad_nd)
def pad(fold: Fold, func: Any, x: Any, pad: Any, *args: Any, **kwargs: Any) -> Any:
    """Padding of the last dimensions."""
    mode = kwargs.get("mode", args[0] if args and isinstance(args[0], str) else "constant")
    if x.ndim < 2 or len(pad) // 2 >= x.ndim:
        if mode != "constant":
            return NotImplemented
        return fold.wrap(func(fold.stack(x), pad, *args, **kwargs))
    return fold.unrows(func(fold.rows(x), pad, *args, **kwargs))


@rule(*named("as_strided as_strided_ as_strided_copy as_strided_scatter"))
def strided(fold: Fold, func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Windows on memory, whose layout is not a member's own."""
    raise NotFoldable(f"{func.__name__} looks at memory, which holds all members")


@rule(*named("new_zeros new_ones new_empty new_full new_tensor"))
def new(fold: Fold, func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """A tensor of the same dtype and device, which depends on nothing that differs between members.

    Outside a pass, as in ``nn.init``, it may be filled with random numbers, which differ: each member gets its own.
    """
    if fold.outside or any(member_valued(a) for a in (*args, *kwargs.values())):
        return NotImplemented
    return fold.common(func(torch.empty(0, dtype=x.dtype, device=x.device), *args, **kwargs))
