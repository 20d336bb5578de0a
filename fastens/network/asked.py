"""What a member's own code asks of its tensors beside their values, answered as for a member that is by itself.

A part of a stack is a view and, where gradients are enabled, no leaf of a graph: a member's parameter is a leaf.
"""

from __future__ import annotations

import contextvars
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastens.fold.names import named
from fastens.fold.tensor import getters
from fastens.network.gradients import gradient_of, set_gradient
from fastens.network.member_tables import parts_of
from fastens.network.own_part import part_of
from fastens.network.parts import Parts, Place
from fastens.scopes import scope

_WITH_FAST_PATHS = nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder
_NAMES = frozenset(
    "is_leaf grad_fn grad zero_grad retains_grad retain_grad requires_grad requires_grad_ register_hook _base _is_view "
    "register_post_accumulate_grad_hook storage storage_offset untyped_storage as_strided as_strided_ as_strided_copy "
    "as_strided_scatter resize_ resize_as_ detach_".split()
)
_MOST = 512  # kinds of calls that are remembered
Switches = dict[Tensor, tuple[bool, bool]]  # of stacks that a call of a member froze or trains: before, and at its end


_SWITCHED: contextvars.ContextVar[list[Switches] | None] = contextvars.ContextVar("switched", default=None)


@contextmanager
def one_by_one() -> Iterator[None]:
    """Scope in which members are called one by one: each finds the same trained and frozen, and they agree in the end.

    Raises:
        ValueError: one member trains what another one freezes.
    """
    ends: list[Switches] = []
    with scope(_SWITCHED, ends):
        yield
    for stack, (before, _) in {x: end for each in ends for x, end in each.items()}.items():
        after = {each[stack][1] if stack in each else before for each in ends}
        if len(after) > 1:
            raise ValueError(
                f"members freeze a parameter {list(stack.shape)} in their calls that others train, and it is one "
                "parameter: freeze it in all of them, or in none"
            )
        stack.requires_grad_(after.pop())


class Questions:
    """Answers what the members of an ensemble ask in their calls, one of which may ask and others not.

    A mode around a call costs each torch function some microseconds, and keeps torch from its fast paths, which give
    other values where a mask pads. So members are watched in all calls where their code has the names of such things in
    it; others in the first call of each kind, for what libraries ask, and in all from the first question on. Those that
    may take fast paths are watched for their names alone.

    Args:
        names: in the code of the members, as it is now.
    """

    def __init__(self, names: Callable[[], frozenset[str]]) -> None:
        self._names = names
        self._asked = False
        self._watched: set[Any] = set()
        self._code: tuple[Any, bool] | None = None  # what was written to the modules, and whether the names are there
        self._with_fast_paths: weakref.WeakKeyDictionary[nn.Module, tuple[Any, list[nn.Module]]] = (
            weakref.WeakKeyDictionary()
        )

    def answered(self, member: nn.Module, writes: Any, kind: Any) -> AbstractContextManager[Any]:
        """Scope of a call of a member.

        Args:
            member: whose tables may be of parts of stacks.
            writes: to its modules, how many there were.
            kind: what tells this call from others; none where it is always watched.
        """
        parts = parts_of(member)
        if parts is None or not (self._may_ask(writes) or self._is_watched(member, writes, kind)):
            return nullcontext()
        return _Answers(parts, self._note)

    def _may_ask(self, writes: Any) -> bool:
        if self._code is None or self._code[0] != writes:
            self._code = writes, not _NAMES.isdisjoint(self._names())
        return self._code[1]

    def _is_watched(self, member: nn.Module, writes: Any, kind: Any) -> bool:
        seen, modules = self._with_fast_paths.get(member, (None, []))
        if seen is None or seen != writes:
            modules = list[nn.Module](each for each in member.modules() if isinstance(each, _WITH_FAST_PATHS))
            self._with_fast_paths[member] = writes, modules
        if any(map(_may_be_fast, modules)):
            return False
        if self._asked or kind is None:
            return True
        if kind in self._watched:
            return False
        if len(self._watched) >= _MOST:
            self._watched.clear()
        self._watched.add(kind)
        return True

    def _note(self) -> None:
        self._asked = True


def answered(member: nn.Module) -> AbstractContextManager[Any]:
    """Scope of code of a member's, in which it is answered."""
    parts = parts_of(member)
    return nullcontext() if parts is None else _Answers(parts, lambda: None)


def _may_be_fast(module: nn.Module) -> bool:
    trained = torch.is_grad_enabled() and any(each.requires_grad for each in module.parameters())
    return not (module.training or trained)


class _Answers(TorchFunctionMode):
    """Answers what is asked of parts of stacks."""

    def __init__(self, parts: Parts, note: Callable[[], None]) -> None:
        super().__init__()
        self._parts, self._note = parts, note
        self._switches: Switches = {}

    def __enter__(self) -> Any:
        if (ends := _SWITCHED.get()) is not None:
            ends.append(self._switches)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for stack, (before, _) in self._switches.items():
            self._switches[stack] = before, stack.requires_grad
            if _SWITCHED.get() is not None:
                stack.requires_grad_(before)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, own, answer = kwargs or {}, _OF_WEIGHTS.get(func), _ANSWERS.get(func)
        given = []
        if "out" in kwargs or func in _RESIZES:
            given = self._give_memory((args, kwargs) if func in _RESIZES else kwargs["out"])
        if own is None and self._switches:
            args, kwargs = pytree.tree_map_only(nn.Parameter, self._as_switched, (args, kwargs))
        if own is not None or answer is not None:
            with torch._C.DisableTorchFunction():
                if own is not None:
                    place = self._parts.place(args[0])
                    if place is not None:
                        self._noted()
                        return getattr(self, own)(func, place, *args, **kwargs)
                elif answer is not None and (part := _part_behind(args[0], self._parts)) is not None:
                    self._noted()
                    return answer(func, part, *args, **kwargs)
        result = func(*args, **kwargs)
        if any(x.shape != shape for x, shape in given):
            self._noted()
        return result

    def _noted(self) -> None:
        self._parts.asked = True
        self._note()

    def grad(self, func: Any, place: Place, x: Tensor) -> Tensor | None:
        """The member's own of the gradient that its stack has."""
        return gradient_of(*place)

    def set_grad(self, func: Any, place: Place, x: Tensor, value: Tensor | None) -> None:
        """Give the member its own of the gradient of the stack."""
        set_gradient(*place, value)

    def switch(self, func: Any, place: Place, x: Tensor, requires_grad: bool = True) -> Tensor:
        """Train, or freeze, the stack with the part: it is one parameter, whose members agree on that."""
        stack, _ = place
        self._switches.setdefault(stack, (stack.requires_grad, requires_grad))
        stack.requires_grad_(requires_grad)
        return x

    def hook(self, func: Any, place: Place, x: Tensor, hook: Callable[[Tensor], Tensor | None]) -> Any:
        """Register the hook for every call, as of a parameter."""
        return self._parts.hook(x, *place, hook) if x.requires_grad else func(x, hook)

    def hook_afterwards(self, func: Any, place: Place, x: Tensor, hook: Any) -> Any:
        """Refuse a hook that is to run when this member has its gradient: all have theirs at once."""
        raise RuntimeError(
            "a member registers a hook that runs when its weight has a gradient, which in an ensemble all members' "
            "weights get at once: register it on the ensemble's parameter"
        )

    def _give_memory(self, written: Any) -> list[tuple[Tensor, torch.Size]]:
        """Give parts that a function may resize memory of their own, beside which there is no other member's.

        Returns:
            The parts, with their shapes.
        """
        with torch._C.DisableTorchFunction():
            parts = {id(part) for _, part in list(self._parts.items())}
            given = [x for x in pytree.tree_leaves(written) if id(x) in parts and not isinstance(x, nn.Parameter)]
            for x in given:
                self._note()
                x.data = x.detach().clone()
        return [(x, x.shape) for x in given]

    def _as_switched(self, x: Tensor) -> Tensor:
        """What a part is since its stack was frozen or is trained again, which is another tensor to autograd."""
        with torch._C.DisableTorchFunction():
            place = self._parts.place(x)
            if place is None or place[0].requires_grad is x.requires_grad:
                return x
            with torch.enable_grad():
                return part_of(*place)


def _part_behind(x: Any, parts: Parts) -> Tensor | None:
    """The part of a stack that a tensor is, or is a view of."""
    if not isinstance(x, Tensor):
        return None
    held = list(parts.items())
    if isinstance(x, nn.Parameter) or any(x is part for _, part in held):
        return x
    base = x._base if x.layout is torch.strided else None
    return None if base is None else next((part for key, part in held if key[1] == id(base)), None)


def _of_part(value: Any) -> Callable[..., Any]:
    """What is always so of a member's own tensor, and of a view of it is what torch says."""
    return lambda func, part, x, *args, **kwargs: value if x is part else func(x, *args, **kwargs)


def _is_leaf(func: Any, part: Tensor, x: Tensor) -> bool:
    return isinstance(x, nn.Parameter) or func(x)


def _grad_fn(func: Any, part: Tensor, x: Tensor) -> Any:
    return None if isinstance(x, nn.Parameter) else func(x)


def _base(func: Any, part: Tensor, x: Tensor) -> Tensor | None:
    return None if x is part else part


def _offset(func: Any, part: Tensor, x: Tensor) -> int:
    return func(x) - part.storage_offset() if part._is_view() else func(x)


def _windows(position: int) -> Callable[..., Any]:
    """Windows on memory, which begin where the member's own memory does.

    Args:
        position: of the argument that says at which element they begin.
    """

    def answer(func: Any, part: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        begin = part.storage_offset() if part._is_view() else 0
        if x is part and func in _SCATTERS:  # torch differentiates none of what begins later in its memory
            return func(x.clone(), *args, **kwargs)
        if kwargs.get("storage_offset") is not None:
            kwargs = {**kwargs, "storage_offset": kwargs["storage_offset"] + begin}
        elif len(args) > position and args[position] is not None:
            args = (*args[:position], args[position] + begin, *args[position + 1 :])
        return func(x, *args, **kwargs)

    return answer


def _resize(func: Any, part: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if x is part and not isinstance(x, nn.Parameter):
        x.data = x.detach().clone()
    return func(x, *args, **kwargs)


def _detach(func: Any, part: Tensor, x: Tensor) -> Tensor:
    return x if x is part and not x.requires_grad else func(x)


def _retain(func: Any, part: Tensor, x: Tensor) -> None:
    if not (x.requires_grad and isinstance(x, nn.Parameter)):  # of a leaf it does nothing
        func(x)


def _repr(func: Any, part: Tensor, x: Tensor, **kwargs: Any) -> str:
    own = nn.Parameter(x.detach(), x.requires_grad) if isinstance(x, nn.Parameter) else x
    return func(own, **kwargs)


def _storage(func: Any, part: Tensor, x: Tensor) -> Any:
    if part._is_view():
        warnings.warn(
            "fastens: a member looks at the storage of a weight, which in an ensemble is that of all members' weights: "
            "its size and address are not those of the member alone",
            stacklevel=3,
        )
    return func(x)


def _answers(answers: dict[str, Callable[..., Any]]) -> dict[Any, Callable[..., Any]]:
    """By the function that torch calls for each name."""
    return {(getters(name) or [getattr(Tensor, name)])[0]: answer for name, answer in answers.items()}


_SCATTERS = named("as_strided_scatter")
_RESIZES = frozenset(named("fused_moving_avg_obs_fake_quant"))  # of what it is given
_ANSWERS: dict[Any, Callable[..., Any]] = (
    _answers(
        {
            "is_leaf": _is_leaf,
            "grad_fn": _grad_fn,
            "retains_grad": _of_part(False),
            "retain_grad": _retain,
            "_base": _base,
            "_is_view": _of_part(False),
            "storage_offset": _offset,
            "untyped_storage": _storage,
            "storage": _storage,
            "resize_": _resize,
            "resize_as_": _resize,
            "detach_": _detach,
            "__repr__": _repr,
        }
    )
    | dict.fromkeys(named("as_strided as_strided_ as_strided_copy"), _windows(2))
    | dict.fromkeys(_SCATTERS, _windows(3))
)
_TRAINED: Any = Tensor.requires_grad  # a property, which it is not in torch's stub
_OF_WEIGHTS: dict[Any, str] = {  # the methods that answer what is asked of parameters
    getters("grad")[0]: "grad",
    vars(torch._C.TensorBase)["grad"].__set__: "set_grad",
    _TRAINED.__set__: "switch",
    Tensor.requires_grad_: "switch",
    Tensor.register_hook: "hook",
    Tensor.register_post_accumulate_grad_hook: "hook_afterwards",
}
