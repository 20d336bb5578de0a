"""What a torch function does inside a pass of all members: by its rule, or entry by entry."""

from __future__ import annotations

import contextvars
import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from fastens.fold.callsite import calling_line, check_derivatives, check_transforms, checkpoint_in_progress
from fastens.fold.dropouts import BY_TORCH, Dropouts
from fastens.fold.names import OPERATIONS, tag_of
from fastens.fold.nested import first_in_front, is_shape, leaves_of, mapped, name_of, plain, takes
from fastens.fold.reads import SHAPED_BY_VALUES, SIZED_BY_VALUES, check_constants, takes_shapes
from fastens.fold.seeds import Seeds
from fastens.fold.sharing import sharing_of_pass
from fastens.fold.slices import entry_by_entry, of_one
from fastens.fold.stand_ins import traced
from fastens.fold.tensor import (
    Hidden,
    MemberTensor,
    NotFoldable,
    ReadsValues,
    all_members,
    member_valued,
    memory_of,
    modules_of,
)
from fastens.fold.writes import Copies, WritesInput, check_written, count_write, depending, of_call, promote, writes_to
from fastens.reference._rows import rows_of
from fastens.scopes import scope

if TYPE_CHECKING:
    from fastens.engine.numbers import Numbers

Rule = Callable[..., Any]  # of (fold, func, *args, **kwargs); NotImplemented for a form that it does not take

RULES: dict[Any, Rule] = {}
OWN_OPS: set[Rule] = set()  # rules that call our ops, which autocast does not know
READS: set[Any] = set()  # functions that give Python the values of a tensor
AS_STEPS: dict[Any, Rule] = {}  # of common values while a pass is recorded: our ops, which plans know
# Functions that draw, also where nothing among the arguments is a member's; by torch's tag the operations that draw.
RANDOM: dict[Any, Rule] = {}


class Fold(TorchFunctionMode):
    """One pass of all members. All that it needs travels with it, so that any number of threads may have one each.

    Args:
        hidden: the hidden dimension of values made in this pass.
        wrapped: let common values be wrappers too, so that they can become member-valued in place.
        recording: a pass whose values are not those of the call: reads are refused, and layouts are those of plans.
        inputs: tensors of the call, which are not written to.
        dropouts: what its dropouts drop.
        numbers: of the call, which the plan that is recorded takes as inputs; none where it takes them as they are.
        reference: take torch's operations instead of kernels for the CPU.
        network: whose pass it is; none of functions that are called outside one.

    Attributes:
        slices: functions that ran entry by entry, and how often.
        ways: of convolution, by the identity of their kernels.
        reads: the line of Python that read a common value first, empty where none did.
        functions: the ``autograd.Function``s that were differentiated.
        copies: of what members have views of.
    """

    def __init__(
        self,
        hidden: Hidden,
        *,
        wrapped: bool = False,
        recording: bool = False,
        inputs: tuple[Tensor, ...] = (),
        dropouts: Dropouts = BY_TORCH,
        numbers: Numbers | None = None,
        reference: bool = False,
        network: torch.nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.hidden = hidden
        self.wrapped = wrapped or recording
        self.recording = recording
        self.dropouts = dropouts
        self.numbers = numbers
        self.reference = reference
        self.slices: Counter[str] = Counter()
        self.reads = ""
        self.functions: set[type] = set()
        self.ways: dict[int, str] = {}
        self.copies = Copies()
        self._sharing_noted = None if network is None else sharing_of_pass()
        self._sharing: dict[int, list[weakref.ref[MemberTensor]]] = {}
        self.inputs = inputs
        self.checkpoint = checkpoint_in_progress()  # around the pass, which runs again as a whole
        self.input_storages = set() if recording else {memory_of(x) for x in inputs} - {None}
        self.seeds = Seeds() if network is not None and not traced(*inputs) else None

    @property
    def outside(self) -> bool:
        """Whether a function was called outside a pass."""
        return self.network is None and not self.dropouts.masked

    @property
    def alone(self) -> bool:
        """Whether this is one member with its masks, as the loop runs it."""
        return self.dropouts.masked and self.hidden.size == 1 and not self.recording

    @staticmethod
    def of(args: Any, kwargs: Any) -> Fold:
        """A pass for a function that is called outside one, with the hidden dimension of its arguments."""
        found = next((x.hidden for x in leaves_of((args, kwargs)) if member_valued(x)), None)
        return Fold(found or all_members(1))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._sharing_noted is not None:
            return self._sharing_noted.noted(func, args, kwargs or {}, lambda: dispatch(self, func, args, kwargs or {}))
        return dispatch(self, func, args, kwargs or {})

    def wrap(self, stack: Tensor, alias: bool = True) -> MemberTensor:
        """A value that each member has its own of; ``stack`` [N, ...]."""
        return MemberTensor(stack, self.hidden, alias)

    def copied(self, stack: Tensor, viewed: Tensor) -> MemberTensor:
        """A value that had to be copied where a member has a view of ``viewed``: neither can be written to."""
        self.copies.add(stack, viewed)
        return MemberTensor(stack, self.hidden, False)

    def common(self, value: Any) -> Any:
        """A value that is the same for all members."""
        return pytree.tree_map_only(Tensor, self._wrapped, value, is_leaf=is_shape) if self.wrapped else value

    def _wrapped(self, x: Tensor) -> MemberTensor:
        if isinstance(x, MemberTensor):
            return x
        wrapper = MemberTensor(x, None)
        self.knows(wrapper)
        return wrapper

    def knows(self, wrapper: MemberTensor) -> None:
        """Remember in which memory a common value is."""
        memory = memory_of(wrapper.stack)
        if memory is not None:
            self._sharing.setdefault(memory, []).append(weakref.ref(wrapper))

    @functools.cached_property
    def tables(self) -> set[int]:
        """The identities of the network's tables of parameters and buffers, which its own code may list."""
        modules = [] if self.network is None else [module for _, module in modules_of(self.network)]
        return {id(table) for module in modules for table in (module._parameters, module._buffers)}

    @functools.cached_property
    def weights(self) -> set[int | None]:
        """The memory of the network's parameters, which a pass does not write to."""
        tables = [] if self.network is None else [module._parameters for _, module in modules_of(self.network)]
        return {memory_of(x) for table in tables for x in dict.values(table) if x is not None} - {None}

    def aliases(self, x: MemberTensor) -> bool:
        """Whether writing to a tensor reaches what a member's would: not an entry of a pass of some."""
        return x.alias and x.hidden is self.hidden

    def sharing(self, storage: int) -> list[MemberTensor]:
        """The wrappers of common values in one memory."""
        found = (ref() for ref in self._sharing.get(storage, ()))
        return [w for w in found if w is not None and w.hidden is None and memory_of(w.stack) == storage]

    def stack(self, x: MemberTensor) -> Tensor:
        """The entries of a member-valued tensor in this pass, [N, ...]."""
        if x.hidden is self.hidden:
            return x.stack
        assert x.hidden is not None
        if x.hidden.whole and x.hidden.num_members == self.hidden.num_members:
            return self.hidden.entries(x.stack)
        raise NotFoldable("a value that an earlier pass over other rows left behind meets this one")

    def entries(self, x: Tensor) -> Tensor:
        """Any tensor as [N, ...]: a common one is seen N times."""
        if type(x) is MemberTensor:
            if x.hidden is not None:
                return self.stack(x)
            x = x.stack
        return x.expand(self.hidden.size, *x.shape)

    def parameters(self, *values: Tensor | None) -> tuple[list[Any], bool]:
        """Parameters as the member-batched ops take them, and whether the offsets of dealt rows go with them.

        Returns:
            Stacks [K, ...] where all are the members' own, else [N, ...], one for each entry of this pass; and whether
            entries find theirs by the offsets of :meth:`Hidden.scaled_offsets`.
        """
        own = [x for x in values if member_valued(x)]
        all_own = len(own) == sum(x is not None for x in values)
        if all_own and all(x.hidden and x.hidden is not self.hidden and x.hidden.whole for x in own):
            stacks = iter([self.hidden.weights(x.stack) for x in own])
            return [None if x is None else next(stacks) for x in values], self.hidden.offsets is not None
        return [None if x is None else self.entries(x) for x in values], False

    def rows(self, x: Tensor) -> Tensor:
        """A tensor of at least one dimension with the hidden dimension folded into the first, [N * B, ...]."""
        if member_valued(x):
            if x.flat is not None and x.hidden is self.hidden:
                return x.flat
            return rows_of(self.stack(x))
        x = plain(x)
        return x.repeat(self.hidden.size, *(1,) * (x.ndim - 1))

    def dealt_tokens(self, x: Tensor) -> MemberTensor | None:
        """Vectors of rows that are dealt out as [1, tokens, width] each, where they are in several rows; else none.

        What acts on vectors alone finds the member of each row by its number, not by that of a vector.
        """
        if self.hidden.offsets is None or not member_valued(x) or x.ndim < 3 or x.shape[0] == 1:
            return None
        return self.wrap(self.stack(x).flatten(1, -2).unsqueeze(1))

    def unrows(self, y: Tensor) -> MemberTensor:
        """The inverse of :meth:`rows`."""
        found = self.wrap(y.unflatten(0, (self.hidden.size, y.shape[0] // self.hidden.size)))
        found.flat = y
        return found

    @staticmethod
    def device_type(args: Any) -> str:
        """The kind of device of the first tensor."""
        return next((x.device.type for x in leaves_of(args) if isinstance(x, Tensor)), "cpu")

    def again(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        """Evaluate another function in this pass, for rules that are made of several."""
        return dispatch(self, func, args, kwargs)


_CURRENT: contextvars.ContextVar[Fold | None] = contextvars.ContextVar("fastens.fold", default=None)


def current_fold() -> Fold | None:
    """The pass in progress in this context."""
    return _CURRENT.get()


@contextmanager
def inside(fold: Fold, calls: Mapping[str, int] | None = None) -> Iterator[None]:
    """Run Python in a pass; or a part of it again, whose dropouts are counted on from ``calls``."""
    entered = nullcontext() if fold in _get_current_function_mode_stack() else fold
    with fold.dropouts.counting_from(calls), scope(_CURRENT, fold), entered:
        yield


def rule(*functions: Any, own_op: bool = False) -> Callable[[Rule], Rule]:
    """Register what a function does to member-valued tensors; ``own_op`` where it calls one of our ops."""

    def register(function: Rule) -> Rule:
        for each in dict.fromkeys(functions):
            assert each not in RULES, each
            RULES[each] = function
        if own_op:
            OWN_OPS.add(function)
        return function

    return register


def dispatch(fold: Fold, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Evaluate a torch function for all members of a pass."""
    if fold.numbers is not None:
        result, args, kwargs = fold.numbers.resolved(fold, func, args, kwargs)
        if result is not NotImplemented:
            return result
    members = False
    wrappers = False
    leaves = leaves_of((args, kwargs) if kwargs else args)
    for leaf in leaves:
        if type(leaf) is MemberTensor:
            wrappers = True
            if leaf.hidden is not None:
                members = True
                break
    if peek_interpreter_stack() is not None:
        check_transforms(leaves)
    if kwargs and not args:
        args, kwargs = first_in_front(kwargs)
    if torch.is_grad_enabled():
        _resume(fold)
        if wrappers:
            check_derivatives(leaves)
    writes = bool(args) and writes_to(func, args, kwargs)
    if fold.outside and writes:
        count_write(args[0])
    draw = RANDOM.get(tag_of(func) if isinstance(func, OPERATIONS) else func)
    if draw is not None:
        if kwargs.get("out") is not None:
            return _into(fold, func, args, kwargs)
        result = draw(fold, func, *args, **kwargs)
        if result is not NotImplemented:
            return result
    sized = SIZED_BY_VALUES.get(func)
    if (sized is not None and sized(args, kwargs)) or (func in SHAPED_BY_VALUES and takes_shapes(func, args, kwargs)):
        fold.reads = fold.reads or f"{name_of(func)} in {calling_line()}"
    if not members:
        if fold.recording and func in AS_STEPS:
            return AS_STEPS[func](fold, func, *args, **kwargs)
        return run_common(fold, func, args, kwargs, wrappers)
    if writes:
        check_written(fold, args[0])
    if fold.alone and (func in READS or (writes and not member_valued(args[0]))):
        fold.reads = fold.reads or f"{name_of(func)} in {calling_line()}"
        return of_one(fold, func, args, kwargs)
    if func in READS:
        raise ReadsValues(f"{name_of(func)} of a tensor that differs between members has no one answer")
    if kwargs.get("out") is not None:
        return _into(fold, func, args, kwargs)
    if writes:
        target = args[0]
        if not member_valued(target):
            promote(fold, target, next(x for x in leaves_of((args, kwargs)) if member_valued(x)))
        elif not fold.aliases(target):
            raise NotFoldable(f"{name_of(func)} writes to a view that had to be copied")
    found = RULES.get(func)
    if found is not None and not (found in OWN_OPS and torch.is_autocast_enabled(fold.device_type(args))):
        try:
            result = found(fold, func, *args, **kwargs)
        except TypeError:
            if takes(found, (fold, func, *args), kwargs):
                raise
            result = NotImplemented  # arguments by names that the rule has not
        if result is not NotImplemented:
            return result
    return entry_by_entry(fold, func, args, kwargs)


def run_common(fold: Fold, func: Any, args: Any, kwargs: Any, wrappers: bool) -> Any:
    """Run a function whose arguments are the same for all members once, as it is."""
    if func in READS and (wrappers or any(isinstance(x, Tensor) for x in leaves_of(args))):
        if fold.recording:
            check_constants(func, args)
        fold.reads = fold.reads or f"{name_of(func)} in {calling_line()}"
    writes = writes_to(func, args, kwargs)
    if writes:
        check_written(fold, args[0] if args else None)
    if not wrappers and not fold.wrapped and not fold.input_storages:
        return func(*args, **kwargs)
    if writes and args and isinstance(args[0], Tensor) and memory_of(plain(args[0])) in fold.input_storages:
        raise WritesInput(f"{name_of(func)} writes to an argument of the call")
    original = args
    if wrappers:
        args, kwargs = mapped(plain, args), mapped(plain, kwargs)
        if writes and isinstance(original[0], MemberTensor):
            if fold.recording:
                args = (depending(fold, original[0], (args[1:], kwargs)), *args[1:])
            result = func(*args, **kwargs)
            if isinstance(result, Tensor):
                original[0].become(args[0], None)
                return original[0]
            return result
    result = func(*args, **kwargs)
    if not fold.wrapped:
        return result
    itself = args and result is args[0] and isinstance(result, Tensor) and not of_call(fold, result)
    return original[0] if itself else fold.common(result)  # as ``table.to(x.device)`` gives a table that is there


def _resume(fold: Fold) -> None:
    """Let a checkpoint that began inside a pass run again inside it: under its hidden dimension, with its masks."""
    frame = checkpoint_in_progress()
    if frame is None or frame is fold.checkpoint or getattr(frame.recompute_fn, "func", None) is _again:
        return
    frame.recompute_fn = functools.partial(_again, fold, fold.dropouts.counted(), frame.recompute_fn)


def _again(fold: Fold, calls: Mapping[str, int], run: Callable[..., None], *args: Any) -> None:
    fold.seeds = None  # the checkpoint itself goes back to where the generator was

    def here(x: Tensor) -> Tensor:
        """An argument, which a checkpoint around this one may have made again, in a second pass over the same rows."""
        if not member_valued(x) or x.hidden is None or x.hidden.whole:
            return x
        return MemberTensor(x.stack, fold.hidden, x.alias)

    check_derivatives(leaves_of(args))
    with inside(fold, calls):
        run(*mapped(here, args))


def _into(fold: Fold, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    rest = {name: value for name, value in kwargs.items() if name != "out"}
    out = kwargs["out"]
    result = dispatch(fold, func, args, rest)
    if not isinstance(out, Tensor) or out.shape != result.shape:
        raise NotFoldable(f"{name_of(func)} resizes or fills several outputs")
    return dispatch(fold, Tensor.copy_, (out, result), {})
