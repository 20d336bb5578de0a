"""The member as a hidden dimension: tensors that have one value per member and look like one member's.

A network's own code sees a :class:`MemberTensor` with the shape that one member sees. Behind it is a stack with the
hidden dimension in front: the members, or, where each row has a member of its own, the rows.
"""

from __future__ import annotations

import contextvars
import copy
import dataclasses
import functools
import math
import weakref
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor

from fastens.refusals import Refusal


class NotFoldable(Refusal):
    """The fold has no one answer for all members; the network is looped instead. The message says what and why."""


class ReadsValues(NotFoldable):
    """Python read the values of a tensor that has one value per member."""


@dataclasses.dataclass(frozen=True, eq=False)
class Hidden:
    """The hidden dimension of one pass.

    Attributes:
        size: its length: members in this pass, or rows.
        num_members: K, of the ensemble.
        first: the first member of a pass over some of them.
        offsets: of rows grouped by member, int64 [K+1], the first row of each member's group and R; else none.
        row_members: likewise, int64 [R], the member of each row.
    """

    size: int
    num_members: int
    first: int = 0
    offsets: Tensor | None = None
    row_members: Tensor | None = None

    def __reduce__(self) -> Any:
        """Members are the same hidden dimension in a copy of what holds them."""
        if self.whole:
            return all_members, (self.num_members,)
        if self.size == 1 and self.offsets is None:
            return one_member, (self.num_members, self.first)
        return super().__reduce__()

    @property
    def whole(self) -> bool:
        """Whether it is all members, each once."""
        return self.offsets is None and self.size == self.num_members

    def scaled_offsets(self, per_entry: int) -> Tensor | None:
        """The group offsets where every row was made of ``per_entry`` rows."""
        return self.offsets if self.offsets is None or per_entry == 1 else self.offsets * per_entry

    def entries(self, stack: Tensor) -> Tensor:
        """A stack of all members [K, ...] as one entry for each of this dimension, [size, ...]."""
        if self.whole:
            return stack
        if self.row_members is None:
            return stack.narrow(0, self.first, self.size)
        return stack.index_select(0, self.row_members)

    def weights(self, stack: Tensor) -> Tensor:
        """A stack of all members [K, ...] as the member-batched ops take it beside :meth:`scaled_offsets`."""
        return stack if self.whole or self.row_members is not None else stack.narrow(0, self.first, self.size)


@functools.cache
def all_members(num_members: int) -> Hidden:
    """The hidden dimension of parameters and of an ordinary pass: the members."""
    return Hidden(num_members, num_members)


@functools.cache
def one_member(num_members: int, k: int) -> Hidden:
    """The hidden dimension of a pass of member k: what it leaves behind in the network is for its next pass."""
    return Hidden(1, num_members, k)


# What ``__torch_function__`` outside a pass and ``__torch_dispatch__`` do, by fold/handlers.py, which knows the rules.
HANDLERS: dict[str, Callable[..., Any]] = {}


_FIELDS = frozenset(("stack", "hidden", "alias", "flat", "symbol", "_is_param", "_known", "told"))


# By identity, what is made in a context that asks for it.
BORN: contextvars.ContextVar[dict[int, weakref.ref[MemberTensor]] | None] = contextvars.ContextVar("born", default=None)


class MemberTensor(Tensor):
    """One tensor per member, of the shape that a member sees; or one for all, while a pass is recorded.

    Attributes:
        stack: [N, *shape] with the hidden dimension in front; [*shape] for a common value.
        hidden: what the hidden dimension is; none for a common value.
        alias: whether writing to it reaches what a member's would; not where a view had to be copied.
        flat: the stack with the hidden dimension folded into the first, where it was made so.
        symbol: whether it stands for a number of the call.
        told: called where code set an attribute of the parameter or buffer that it is.
    """

    stack: Tensor
    hidden: Hidden | None
    alias: bool
    flat: Tensor | None
    symbol: bool = False
    told: Callable[[], None] | None = None

    @staticmethod
    def __new__(cls, stack: Tensor, hidden: Hidden | None, alias: bool = True) -> MemberTensor:
        """Wrap a stack."""
        with torch._C.DisableTorchFunction():
            shape, dtype, device = stack.shape, stack.dtype, stack.device
            shape = shape if hidden is None else torch.Size(shape[1:])
            wrapper = Tensor._make_wrapper_subclass(
                cls, shape, dtype=dtype, device=device, requires_grad=stack.requires_grad
            )
        own = wrapper.__dict__
        own["stack"], own["hidden"], own["alias"], own["flat"] = stack, hidden, alias, None
        own["_is_param"] = isinstance(stack, torch.nn.Parameter)
        own["_known"] = shape, dtype, device  # asked of the stack inside a pass they would be functions of it
        if (born := BORN.get()) is not None:
            born[id(wrapper)] = weakref.ref(wrapper)
        return wrapper

    def __init__(self, *_: Any) -> None:
        pass

    def become(self, stack: Tensor, hidden: Hidden | None) -> None:
        """Take other values, as an operation in place gives a tensor others."""
        self.stack, self.hidden, self.flat = stack, hidden, None
        shape = stack.shape if hidden is None else torch.Size(stack.shape[1:])
        self._known = shape, stack.dtype, stack.device

    def fits(self) -> bool:
        """Whether the stack still is of the shape and dtype that it had, which ``stack.data = ...`` may change."""
        with torch._C.DisableTorchFunction():
            stack = self.stack
            shape = stack.shape if self.hidden is None else stack.shape[1:]
            return (shape, stack.dtype, stack.device) == self._known

    @property
    def shape(self) -> torch.Size:  # pyright: ignore[reportIncompatibleVariableOverride]  # a wrapper tells what the member sees
        """The shape that a member sees."""
        return self._known[0]

    @property
    def ndim(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]  # a wrapper tells what the member sees
        """How many dimensions a member sees."""
        return len(self._known[0])

    @property
    def dtype(self) -> torch.dtype:  # pyright: ignore[reportIncompatibleVariableOverride]  # a wrapper tells what the member sees
        """The dtype of every member's tensor."""
        return self._known[1]

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleVariableOverride]  # a wrapper tells what the member sees
        """Where the stack is."""
        return self._known[2]

    @property
    def requires_grad(self) -> bool:
        """Whether gradients reach the stack."""
        return self.stack.requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.stack.requires_grad_(value)
        self.flat = None  # to which no graph leads from there

    def size(self, dim: int | None = None) -> Any:
        """The shape that a member sees, or one of its entries."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """How many dimensions a member sees."""
        return self.ndim

    def numel(self) -> int:
        """How many elements a member sees."""
        return math.prod(self.shape)  # which keeps a dynamic size so

    def __getattr__(self, name: str) -> Any:
        """What code set on a parameter or buffer, whose stack has it."""
        stack = self.__dict__.get("stack")
        if stack is not None and name in vars(stack):
            return vars(stack)[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        """What code sets on a parameter or buffer, its stack gets."""
        stack = self.__dict__.get("stack")
        of_weight = stack is not None and name not in _FIELDS and _OF_STACKS.get(id(stack)) is self
        if of_weight and not hasattr(MemberTensor, name):
            vars(stack)[name] = value
            if self.told is not None:
                self.told()
        else:
            super().__setattr__(name, value)

    def __len__(self) -> int:
        if not self.ndim:
            raise TypeError("len() of a 0-d tensor")
        return self.shape[0]

    def __hash__(self) -> int:
        if self.symbol:
            raise ReadsValues("a number of the call is looked up in a table of Python's")
        return id(self)

    def __repr__(self, **kwargs: Any) -> str:
        if self.symbol:
            raise ReadsValues("a number of the call is written as text")
        if HANDLERS.get("inside", bool)():  # a network's own code reads the values in it
            return HANDLERS["read"](Tensor.__repr__, (self,), kwargs)
        kind = "common" if self.hidden is None else f"{self.hidden.size} values of"
        return f"MemberTensor({kind} {list(self.shape)}, {self.dtype})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return MemberTensor, (self.stack, self.hidden, self.alias)

    def __copy__(self) -> MemberTensor:
        """As of one member's tensor: another one in the same memory, to which no graph leads."""
        with torch._C.DisableTorchFunction():
            return MemberTensor(copy.copy(self.stack), self.hidden, self.alias)

    def __deepcopy__(self, memo: dict[int, Any]) -> MemberTensor:
        with torch._C.DisableTorchFunction():
            own = copy.deepcopy(self.stack)  # of a parameter one, and no copy of what autograd made, as in a member
        copied = memo[id(self)] = MemberTensor(own, self.hidden, self.alias)
        return copied

    def set_(self, *args: Any, **kwargs: Any) -> Any:
        """Refused, as ``resize_`` is; torch asks no subclass by itself."""
        return self.__torch_function__(Tensor.set_, (type(self),), (self, *args), kwargs)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return HANDLERS["function"](func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return HANDLERS["dispatch"](func, args, kwargs or {})


_OF_STACKS: weakref.WeakValueDictionary[int, MemberTensor] = weakref.WeakValueDictionary()  # by identity


def of_stack(stack: Tensor, num_members: int) -> MemberTensor:
    """What members see of a stack: one object for tied tensors, as in a member."""
    known, hidden = _OF_STACKS.get(id(stack)), all_members(num_members)
    if known is not None and known.stack is stack and known.hidden is hidden:
        if not known.fits():  # converted since, or given other data
            known.become(stack, hidden)
        return known
    with torch.inference_mode(False), torch._C.DisableTorchFunction():  # it is kept for calls outside it
        made = _OF_STACKS[id(stack)] = MemberTensor(stack, hidden)
    return made


TABLES = ("_parameters", "_buffers", "_modules")  # of a module, among its attributes


def table_of(module: torch.nn.Module, name: str) -> Any:
    """The parameters, buffers or modules of a module; a traced one has them elsewhere."""
    attributes = vars(module)
    return attributes[name] if name in attributes else getattr(module, name)


def modules_of(module: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """A module and all inside it by path, as ``named_modules`` lists them, which asks a generator for each level."""
    found: list[tuple[str, torch.nn.Module]] = []
    seen: set[int] = set()

    def visit(path: str, each: torch.nn.Module) -> None:
        seen.add(id(each))
        found.append((path, each))
        children = vars(each).get("_modules")
        for name, child in (each._modules if children is None else children).items():
            if child is not None and id(child) not in seen:
                visit(f"{path}.{name}" if path else name, child)

    visit("", module)
    return found


def tensors_of(module: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, each tied tensor once under its first name."""
    modules = [(f"{path}." if path else "", each) for path, each in modules_of(module)]
    found: dict[str, Tensor] = {}
    for table in ("_parameters", "_buffers"):
        seen: set[int] = set()
        for prefix, each in modules:
            if tensors := table_of(each, table):
                for name, tensor in tensors.items():
                    if tensor is not None and id(tensor) not in seen:
                        seen.add(id(tensor))
                        found[prefix + name] = tensor
    return found


def memory_of(x: Tensor) -> int | None:
    """Which memory a tensor is in; none where it is not strided, or of a transform, which shows none."""
    try:
        with torch._C.DisableTorchFunction():
            return x.untyped_storage()._cdata if x.layout is torch.strided else None
    except NotImplementedError:
        return None


def getters(names: str) -> list[Any]:
    """The functions by which torch reads attributes of tensors, of those that there are."""
    found: list[Any] = [getattr(Tensor, name, None) for name in names.split()]
    return [each.__get__ for each in found if hasattr(each, "__get__") and not callable(each)]


def member_valued(x: Any) -> TypeGuard[MemberTensor]:
    """Whether a value differs between members."""
    return type(x) is MemberTensor and x.hidden is not None
