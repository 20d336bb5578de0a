"""A tensor that has one value per member, met by a member's own code.

A module that is not registered runs its own forward on the folded batch, and reads its parameters as
:class:`MemberTensor`. Operations among member tensors stay one value per member. Where one meets a tensor of the
folded batch, every row gets its member's value; functions that own a fast member-batched op (``F.linear``,
``F.conv2d``, ``F.group_norm``, ...) take it. What fits neither raises :class:`NotFoldable`, and the module is looped.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fastens.fold.rows import NotFoldable, Rows

# Functions of batch-first tensors that act on each row alone, so that a row may be given its member's value.
ROW_WISE = frozenset(
    """
    add sub rsub subtract mul multiply div true_divide divide pow remainder fmod where lerp addcmul addcdiv maximum
    minimum clamp atan2 eq ne lt le gt ge logaddexp cat concat concatenate matmul bmm baddbmm
    scaled_dot_product_attention add_ sub_ mul_ div_ __add__ __radd__ __iadd__ __sub__ __rsub__ __isub__ __mul__
    __rmul__ __imul__ __truediv__ __rtruediv__ __itruediv__ __div__ __rdiv__ __idiv__ __pow__ __rpow__ __matmul__
    __rmatmul__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__
    """.split()
)

# Functions of one tensor that act on each element alone: a stack takes them as it is.
ELEMENTWISE = frozenset(
    """
    to type float double half bfloat16 clone contiguous detach neg abs exp log log1p expm1 sin cos tanh sigmoid relu
    silu gelu softplus sqrt rsqrt square reciprocal __neg__ __abs__
    """.split()
)

FUNCTIONS: dict[Callable[..., Any], Callable[..., Any]] = {}


def folds(*functions: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register what to call instead of a torch function when one of its arguments is a member tensor."""

    def register(folded: Callable[..., Any]) -> Callable[..., Any]:
        FUNCTIONS.update(dict.fromkeys(functions, folded))
        return folded

    return register


class MemberTensor:
    """One tensor per member, of the shape that a member sees.

    Attributes:
        stack: [K, *shape].
        rows: which member each row of the folded batch belongs to.
    """

    def __init__(self, stack: Tensor, rows: Rows) -> None:
        self.stack = stack
        self.rows = rows

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return apply(func, args, kwargs or {})

    @property
    def shape(self) -> torch.Size:
        """The shape that a member sees."""
        return self.stack.shape[1:]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of every member's tensor."""
        return self.stack.dtype

    @property
    def device(self) -> torch.device:
        """Where the stack is."""
        return self.stack.device

    @property
    def ndim(self) -> int:
        """How many dimensions a member sees."""
        return self.stack.ndim - 1

    @property
    def requires_grad(self) -> bool:
        """Whether gradients reach the stack."""
        return self.stack.requires_grad

    def size(self, dim: int | None = None) -> Any:
        """The shape that a member sees, or one of its entries."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """How many dimensions a member sees."""
        return self.ndim

    def numel(self) -> int:
        """How many elements a member sees."""
        return self.shape.numel()

    def __len__(self) -> int:
        return self.shape[0]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in {"stack", "rows"}:
            raise AttributeError(name)
        attribute = getattr(torch.Tensor, name)
        if callable(attribute):
            return lambda *args, **kwargs: apply(attribute, (self, *args), kwargs)
        return apply(lambda tensor: getattr(tensor, name), (self,), {})

    def for_rows(self, ndim: int, num_rows: int) -> Tensor:
        """Each row's value, to meet a batch-first tensor of ``ndim`` dimensions and ``num_rows`` rows."""
        rows = self.rows
        if self.ndim > ndim:
            raise NotFoldable(f"a parameter of shape {list(self.shape)} meets a batch of {ndim} dimensions")
        if self.ndim < ndim:  # broadcast from the right, behind the batch
            expanded = rows.expand(self.stack, num_rows)
            return expanded.reshape(num_rows, *(1,) * (ndim - 1 - self.ndim), *self.shape)
        if self.shape[0] == 1:
            return rows.expand(self.stack[:, 0], num_rows)
        if self.shape[0] == num_rows:  # was expanded to the batch by the network itself: row r of its own member
            return self.stack[rows.members(num_rows, self.device), torch.arange(num_rows, device=self.device)]
        raise NotFoldable(f"a parameter of shape {list(self.shape)} has no batch dimension to meet the rows in")


def _operator(name: str) -> Callable[..., Any]:
    function = getattr(torch.Tensor, name)

    def operator(self: MemberTensor, *args: Any) -> Any:
        return apply(function, (self, *args), {})

    return operator


_OPERATORS = "add radd sub rsub mul rmul truediv rtruediv pow rpow matmul rmatmul neg abs getitem eq ne lt le gt ge"
for _name in _OPERATORS.split():
    setattr(MemberTensor, f"__{_name}__", _operator(f"__{_name}__"))


def apply(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Evaluate a torch function some of whose arguments are member tensors."""
    folded = FUNCTIONS.get(func)
    if folded is not None:
        result = folded(*args, **kwargs)
        if result is not NotImplemented:
            return result
    leaves, spec = pytree.tree_flatten((args, kwargs))
    where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, MemberTensor)]
    rows = leaves[where[0]].rows
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    batch = [tensor for tensor in tensors if tensor.numel() != 1 and rows.carries_batch(tensor)]
    if batch:
        name = getattr(func, "__name__", str(func))
        if name not in ROW_WISE:
            raise NotFoldable(f"{name} of a parameter and the batch has no member-batched form")
        ndim, num_rows = max((tensor.ndim, tensor.shape[0]) for tensor in batch)
        for i in where:
            leaves[i] = leaves[i].for_rows(ndim, num_rows)
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        return func(*args, **kwargs)
    return _each_member(func, leaves, where, spec, rows)


def _each_member(func: Callable[..., Any], leaves: list[Any], where: list[int], spec: Any, rows: Rows) -> Any:
    def member(*values: Tensor) -> Any:
        filled = list(leaves)
        for i, value in zip(where, values, strict=True):
            filled[i] = value
        args, kwargs = pytree.tree_unflatten(filled, spec)
        return func(*args, **kwargs)

    stacks = [leaves[i].stack for i in where]
    try:
        if _elementwise(func, leaves, where):
            result = member(*stacks)
        elif torch.compiler.is_exporting():
            # The modes that export traces with are off inside __torch_function__, so that vmap's tensors would escape.
            result = _stacked(member, stacks)
        else:
            result = torch.vmap(member, randomness="different")(*stacks)
    except (ValueError, RuntimeError) as error:
        raise NotFoldable(f"{getattr(func, '__name__', func)} of a parameter: {error}") from error
    return pytree.tree_map_only(Tensor, lambda stack: MemberTensor(stack, rows), result)


@folds(torch.Tensor.to, torch.Tensor.type_as)
def _converted(input: Any, *args: Any, **kwargs: Any) -> Any:
    """``parameter.to(x)`` takes the dtype and device of ``x``, and nothing of its values."""
    other = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
    if other is None or not isinstance(input, MemberTensor):
        return NotImplemented
    return input.to(device=other.device, dtype=other.dtype)


def _elementwise(func: Callable[..., Any], leaves: list[Any], where: list[int]) -> bool:
    plain = not any(isinstance(leaf, Tensor | torch.memory_format) for leaf in leaves)
    return plain and where == [0] and getattr(func, "__name__", "") in ELEMENTWISE


def _stacked(member: Callable[..., Any], stacks: list[Tensor]) -> Any:
    flat = [pytree.tree_flatten(member(*values)) for values in zip(*stacks, strict=True)]
    columns = list(zip(*(leaves for leaves, _ in flat), strict=True))
    if not all(isinstance(column[0], Tensor) for column in columns):
        raise ValueError("its result is no tensor, and may differ between members")
    return pytree.tree_unflatten([torch.stack(column) for column in columns], flat[0][1])
