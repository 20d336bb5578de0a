"""What a torch function does inside a pass of all members: by its rule, or entry by entry."""

from __future__ import annotations

import types as python_types
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastens.fold.tensor import Hidden, MemberTensor, NotFoldable, ReadsValues, all_members, member_valued
from fastens.plan.record import in_progress

Rule = Callable[..., Any]  # of (fold, func, *args, **kwargs); NotImplemented for a form that it does not take

RULES: dict[Any, Rule] = {}
OWN_OPS: set[Rule] = set()  # rules that call our ops, which autocast does not know
READS: set[Any] = set()  # functions that give Python the values of a tensor
AS_STEPS: dict[Any, Rule] = {}  # of common values while a pass is recorded: our ops, which plans know better than torch's
RANDOM: dict[Any, Rule] = {}  # functions that draw, also where nothing among the arguments is a member's


class NeedsWrappers(NotFoldable):
    """A tensor that was the same for all members received member-valued numbers: it must be a wrapper from birth."""

    def __init__(self, written: Tensor) -> None:
        super().__init__("a tensor that is the same for all members receives member-valued numbers")
        self.written = written


class WritesInput(NotFoldable):
    """The network writes to an argument of the call, which is the caller's."""


class Fold(TorchFunctionMode):
    """One pass of all members. All that it needs travels with it, so that any number of threads may have one each.

    Args:
        hidden: the hidden dimension of values made in this pass.
        wrapped: let common values be wrappers too, so that they can become member-valued in place.
        recording: a pass whose values are not those of the call: reads are refused, and layouts are those of plans.
        inputs: tensors of the call, which are not written to.
        masks: of an ensemble of dropout masks.
        reference: take torch's operations instead of kernels for the CPU.

    Attributes:
        slices: functions that ran entry by entry, and how often.
        reads: the line of Python that read a common value first, empty where none did.
    """

    def __init__(
        self,
        hidden: Hidden,
        *,
        wrapped: bool = False,
        recording: bool = False,
        inputs: tuple[Tensor, ...] = (),
        masks: Any = None,
        reference: bool = False,
    ) -> None:
        super().__init__()
        self.hidden = hidden
        self.wrapped = wrapped or recording
        self.recording = recording
        self.masks = masks
        self.reference = reference
        self.slices: Counter[str] = Counter()
        self.reads = ""
        self._sharing: dict[int, list[weakref.ref[MemberTensor]]] = {}
        self.inputs = inputs
        self.input_storages = set() if recording else {
            x.untyped_storage()._cdata for x in inputs if x.layout is torch.strided
        }

    @staticmethod
    def of(args: Any, kwargs: Any) -> Fold:
        """A pass for a function that is called outside one, with the hidden dimension of its arguments."""
        found = next((x.hidden for x in leaves_of((args, kwargs)) if member_valued(x)), None)
        return Fold(found or all_members(1))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(self, func, args, kwargs or {})

    def wrap(self, stack: Tensor, alias: bool = True) -> MemberTensor:
        """A value that each member has its own of; ``stack`` [N, ...]."""
        return MemberTensor(stack, self.hidden, alias)

    def common(self, value: Any) -> Any:
        """A value that is the same for all members."""
        return pytree.tree_map_only(Tensor, self._wrapped, value) if self.wrapped else value

    def _wrapped(self, x: Tensor) -> MemberTensor:
        if isinstance(x, MemberTensor):
            return x
        wrapper = MemberTensor(x, None)
        self.knows(wrapper)
        return wrapper

    def knows(self, wrapper: MemberTensor) -> None:
        """Remember in which memory a common value is."""
        if wrapper.stack.layout is torch.strided:
            self._sharing.setdefault(wrapper.stack.untyped_storage()._cdata, []).append(weakref.ref(wrapper))

    def sharing(self, storage: int) -> list[MemberTensor]:
        """The wrappers of common values in one memory."""
        found = (ref() for ref in self._sharing.get(storage, ()))
        return [w for w in found if w is not None and w.hidden is None and w.stack.untyped_storage()._cdata == storage]

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

    def weights(self, x: Tensor | None) -> Tensor | None:
        """A parameter as the member-batched ops take it: [K, ...] beside offsets, or [N, ...]."""
        if x is None:
            return None
        if member_valued(x) and x.hidden is not self.hidden and x.hidden.whole:
            return self.hidden.weights(x.stack)
        return self.entries(x)

    def rows(self, x: Tensor) -> Tensor:
        """A tensor of at least one dimension with the hidden dimension folded into the first, [N * B, ...]."""
        if member_valued(x):
            if x.flat is not None and x.hidden is self.hidden:
                return x.flat
            return self.stack(x).flatten(0, 1)
        x = plain(x)
        return x.repeat(self.hidden.size, *(1,) * (x.ndim - 1))

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


def plain(x: Any) -> Any:
    """A common value without its wrapper."""
    return x.stack if type(x) is MemberTensor and x.hidden is None else x


def leaves_of(tree: Any) -> Iterator[Any]:
    """The leaves of nested lists, tuples and dictionaries."""
    if isinstance(tree, list | tuple):
        for item in tree:
            yield from leaves_of(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from leaves_of(item)
    else:
        yield tree


def mapped(function: Callable[[Any], Any], tree: Any) -> Any:
    """The same nesting with a function applied to every tensor."""
    if isinstance(tree, Tensor):
        return function(tree)
    if type(tree) in (list, tuple):
        return type(tree)([mapped(function, item) for item in tree])
    if isinstance(tree, tuple):  # a named tuple, a size
        return tree if isinstance(tree, torch.Size) else type(tree)(*[mapped(function, item) for item in tree])
    if isinstance(tree, dict):
        return {key: mapped(function, item) for key, item in tree.items()}
    if isinstance(tree, slice):
        return slice(*[mapped(function, item) for item in (tree.start, tree.stop, tree.step)])
    return tree


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


_NAMESPACES: tuple[Any, ...] = (
    torch,
    torch.Tensor,
    torch.nn.functional,
    torch._C._nn,
    torch.special,
    torch.linalg,
    torch.fft,
    torch._C._VariableFunctions,
)


def named(*names: str) -> list[Any]:
    """Every torch function and method of these names, each once."""
    found: dict[Any, None] = {}
    for name in " ".join(names).split():
        for space in _NAMESPACES:
            function = getattr(space, name, None)
            if callable(function) and not isinstance(function, type | python_types.ModuleType):
                found.setdefault(function)
    return list(found)


def writes_to(func: Any, args: Any) -> bool:
    """Whether a function changes its first argument."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return False
    in_place = (name.endswith("_") and not name.endswith("__")) or name == "__setitem__" or name == "__set__"
    return in_place or (name.startswith("__i") and name.endswith("__") and name not in ("__index__", "__int__", "__invert__"))


def dispatch(fold: Fold, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Evaluate a torch function for all members of a pass."""
    members = False
    wrappers = False
    for leaf in leaves_of((args, kwargs)) if kwargs else _shallow(args):
        if type(leaf) is MemberTensor:
            wrappers = True
            if leaf.hidden is not None:
                members = True
                break
    if func in RANDOM:
        return RANDOM[func](fold, func, *args, **kwargs)
    if not members:
        if fold.recording and func in AS_STEPS:
            return AS_STEPS[func](fold, func, *args, **kwargs)
        return _run_common(fold, func, args, kwargs, wrappers)
    if torch.is_grad_enabled():
        _check_derivatives((args, kwargs))
    if func in READS:
        raise ReadsValues(f"{_name(func)} of a tensor that differs between members has no one answer")
    if kwargs.get("out") is not None:
        return _into(fold, func, args, kwargs)
    if writes_to(func, args):
        target = args[0]
        if not member_valued(target):
            promote(fold, target, next(x for x in leaves_of((args, kwargs)) if member_valued(x)))
        elif not target.alias:
            raise NotFoldable(f"{_name(func)} writes to a view that had to be copied")
    found = RULES.get(func)
    if found is not None and not (found in OWN_OPS and torch.is_autocast_enabled(fold.device_type(args))):
        result = found(fold, func, *args, **kwargs)
        if result is not NotImplemented:
            return result
    return entry_by_entry(fold, func, args, kwargs)


def _shallow(args: tuple[Any, ...]) -> Iterator[Any]:
    for arg in args:
        if isinstance(arg, list | tuple | dict | slice):
            yield from leaves_of(arg if not isinstance(arg, slice) else [arg.start, arg.stop, arg.step])
        else:
            yield arg


def _name(func: Any) -> str:
    name = getattr(func, "__name__", str(func))
    return getattr(getattr(func, "__self__", None), "__name__", name) if name in ("__get__", "__set__") else name


def _run_common(fold: Fold, func: Any, args: Any, kwargs: Any, wrappers: bool) -> Any:
    """Run a function whose arguments are the same for all members once, as it is."""
    if func in READS and wrappers | _has_tensor(args):
        if fold.recording:
            raise ReadsValues(f"{_name(func)} reads values of the input in {calling_line()}")
        fold.reads = fold.reads or f"{_name(func)} in {calling_line()}"
    if not wrappers and not fold.wrapped and not fold.input_storages:
        return func(*args, **kwargs)
    writes = writes_to(func, args)
    if writes and args and isinstance(args[0], Tensor):
        target = plain(args[0])
        if target.layout is torch.strided and target.untyped_storage()._cdata in fold.input_storages:
            raise WritesInput(f"{_name(func)} writes to an argument of the call")
    if wrappers:
        original, (args, kwargs) = args, (mapped(plain, args), mapped(plain, kwargs))
        if writes and isinstance(original[0], MemberTensor):
            if fold.recording:
                args = (_depending(fold, original[0], (args[1:], kwargs)), *args[1:])
            result = func(*args, **kwargs)
            if isinstance(result, Tensor):
                original[0].become(args[0], None)
                return original[0]
            return result
    result = func(*args, **kwargs)
    return fold.common(result) if fold.wrapped else result


def _depending(fold: Fold, target: MemberTensor, sources: Any) -> Tensor:
    """What a recording writes to in place of a constant, which it must not change: memory that depends on the call."""
    value, recording = target.stack, in_progress()
    if recording is None or recording.depends(value):
        return value
    source = next((x for x in leaves_of(sources) if isinstance(x, Tensor) and recording.depends(x)), None)
    if source is None:
        return value
    if value._base is not None or _is_shared(fold, value, [target]):
        raise NotFoldable("a tensor that others share memory with is written to")
    made = source.new_empty(value.shape, dtype=value.dtype)
    made.copy_(value)
    target.become(made, None)
    fold.knows(target)
    return made


def _is_shared(fold: Fold, value: Tensor, wrappers: list[MemberTensor]) -> bool:
    """Whether another tensor sees the memory of one: beside wrappers, its storage's Python object, and a recording."""
    known = {id(w.stack) for w in wrappers} | ({id(value._base)} if value._base is not None else set())
    storage = value.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata) > len(known) + 1 + fold.recording


def _has_tensor(args: Any) -> bool:
    return any(isinstance(x, Tensor) for x in leaves_of(args))


def promote(fold: Fold, target: Any, source: Any = None) -> None:
    """Let a common tensor become member-valued, so that member-valued numbers can be written to it.

    Args:
        fold: the pass.
        target: the tensor.
        source: what is written; a recording must see that the tensor depends on it.
    """
    if not isinstance(target, Tensor):
        return
    if type(target) is not MemberTensor:
        raise NeedsWrappers(target)
    value = target.stack
    storage = value.untyped_storage()
    if storage._cdata in fold.input_storages:
        raise WritesInput("member-valued numbers are written to an argument of the call")
    wrappers = fold.sharing(storage._cdata)
    if any(w.stack.dtype != value.dtype for w in wrappers) or _is_shared(fold, value, wrappers):
        raise NotFoldable("a tensor that others share memory with receives member-valued numbers")
    size, count = fold.hidden.size, storage.nbytes() // value.element_size()
    flat = value.as_strided((count,), (1,), 0)
    if fold.recording and source is not None:
        whole = fold.stack(source).new_empty(size * count, dtype=value.dtype)
        whole.copy_(flat.repeat(size))
    else:
        whole = flat.repeat(size)
    for w in wrappers:  # all that see the memory see the members' from now on
        strides = (count, *w.stack.stride())
        w.become(whole.as_strided((size, *w.stack.shape), strides, w.stack.storage_offset()), fold.hidden)


def _check_derivatives(tree: Any) -> None:
    """Raise where an ``autograd.Function`` made a tensor: its derivatives went by the wrapper, not by the stack."""
    for leaf in leaves_of(tree):
        if type(leaf) is MemberTensor and not leaf.stack.requires_grad:
            with torch._C.DisableTorchFunctionSubclass():
                detached = Tensor.requires_grad.__get__(leaf)
            if detached:
                raise NotFoldable("an autograd.Function of the network differentiates by itself")


def _into(fold: Fold, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    rest = {name: value for name, value in kwargs.items() if name != "out"}
    out = kwargs["out"]
    result = dispatch(fold, func, args, rest)
    if not isinstance(out, Tensor) or out.shape != result.shape:
        raise NotFoldable(f"{_name(func)} resizes or fills several outputs")
    return dispatch(fold, Tensor.copy_, (out, result), {})


def entry_by_entry(fold: Fold, func: Any, args: Any, kwargs: Any) -> Any:
    """Run a function once for each entry of the hidden dimension and stack the results: right for any function."""
    name = _name(func)
    fold.slices[name] += 1
    columns: dict[int, Any] = {}
    writes = writes_to(func, args)

    def entries(x: Tensor) -> Any:
        if member_valued(x) and id(x) not in columns:
            stack = fold.stack(x)  # pyright: ignore[reportArgumentType]
            columns[id(x)] = [stack[n] for n in range(len(stack))] if writes else stack.unbind(0)
        return x

    mapped(entries, (args, kwargs))
    shared = [x for x in leaves_of((args, kwargs)) if isinstance(x, Tensor) and id(x) not in columns]
    shared = [(x, x._version) for x in map(plain, shared) if not x.is_inference()]
    results = []
    for n in range(fold.hidden.size):
        own_args, own_kwargs = mapped(
            lambda x, n=n: columns[id(x)][n] if id(x) in columns else plain(x), (args, kwargs)
        )
        results.append(func(*own_args, **own_kwargs))
    if not results:
        raise NotFoldable(f"{name} of no rows")
    if any(x._version != version for x, version in shared):
        raise NotFoldable(f"{name} writes to a tensor that is the same for all members")
    if writes:
        if isinstance(results[0], Tensor) and results[0].shape != args[0].shape:
            raise NotFoldable(f"{name} changes the shape of what it writes to")
        return args[0] if isinstance(results[0], Tensor) else None  # written through the views of its entries
    storages = {x[0].untyped_storage()._cdata for x in columns.values() if x[0].layout is torch.strided}
    return stacked(fold, results, name, storages)


def stacked(fold: Fold, results: list[Any], name: str, storages: set[int] = frozenset()) -> Any:  # pyright: ignore[reportArgumentType]
    """The results of one function for every entry as one: tensors stacked, anything else alike.

    Raises:
        NotFoldable: they are of different shapes, or differ otherwise.
    """
    flat = [pytree.tree_flatten(result) for result in results]
    if any(spec != flat[0][1] for _, spec in flat):
        raise NotFoldable(f"{name} gives members results of different structure")
    joined = []
    for column in zip(*(leaves for leaves, _ in flat), strict=True):
        first = column[0]
        if isinstance(first, Tensor):
            if any(x.shape != first.shape or x.dtype != first.dtype for x in column):
                raise NotFoldable(f"{name} gives members tensors of different shapes")
            alias = first.layout is not torch.strided or first.untyped_storage()._cdata not in storages
            joined.append(fold.wrap(torch.stack(column), alias))
        else:
            if any(type(x) is not type(first) or x != first for x in column):
                raise ReadsValues(f"{name} gives members different values")
            joined.append(first)
    return pytree.tree_unflatten(joined, flat[0][1])


def below_autograd(fold: Fold, func: Any, args: Any, kwargs: Any) -> Any:
    """An operation that came past Python's functions: entry by entry, where nothing is differentiated."""
    wants = torch.is_grad_enabled() and any(
        isinstance(x, MemberTensor) and x.stack.requires_grad for x in leaves_of((args, kwargs))
    )
    if wants:
        raise NotFoldable(f"{func} of a scripted function or an extension cannot be differentiated for all members")
    if torch.Tag.data_dependent_output in func.tags or func is torch.ops.aten._local_scalar_dense.default:
        if any(member_valued(x) for x in leaves_of((args, kwargs))):
            raise ReadsValues(f"{func} of a tensor that differs between members has no one answer")
    if func is torch.ops.aten.detach.default:
        return MemberTensor(args[0].stack.detach(), args[0].hidden, args[0].alias)
    if not any(member_valued(x) for x in leaves_of((args, kwargs))):
        return _run_common(fold, func, args, kwargs, True)
    return entry_by_entry(fold, func, args, kwargs)


def calling_line() -> str:
    """File and line of the network's Python that called the function in progress."""
    import sys

    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if not module.startswith(("torch", "fastens.fold", "fastens.plan")):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return "an unknown place"
