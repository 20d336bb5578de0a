"""Recording a folded pass: every operation that it does, in order, with where its tensors are.

Shapes are those of one signature, so Python control flow is taken as it went. A network whose control flow depends on
the values of its input, or that draws random numbers, is not recorded.
"""

from __future__ import annotations

import contextvars
import dataclasses
import functools
from collections.abc import Callable
from types import UnionType
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from fastens.refusals import Refusal, insisted
from fastens.scopes import scope

_OTHER_MEMORY = {"aten::set_", "aten::resize_", "aten::resize_as_", "aten::swap"}
Sketch = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]


class NotRecordable(Refusal):
    """The pass has no fixed list of operations; the message says why."""


class NotLowerable(Exception):
    """The program has no step for this; the message says what."""


@dataclasses.dataclass(frozen=True)
class Ref:
    """A tensor as a view of a storage: offset and strides in elements."""

    storage: int
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """How many elements the view has."""
        count = 1
        for n in self.size:
            count *= n
        return count

    @property
    def span(self) -> int:
        """How many elements lie from its first to its last, at least one."""
        return 1 + sum((n - 1) * s for n, s in zip(self.size, self.stride, strict=True)) if self.numel else 1


def same_view(a: Ref, b: Ref) -> bool:
    """Whether two references are the same elements in the same order."""
    return a.storage == b.storage and a.offset == b.offset and a.size == b.size and a.stride == b.stride


@dataclasses.dataclass(frozen=True)
class MaskInputs:
    """Of a pass under dropout masks: how many members have some, and where fresh ones are drawn from.

    ``drawn`` is the input with the number of the evaluation and then the key of each dropout, none where masks are
    fixed. ``keys`` says at which of its entries each key of the recorded pass is.
    """

    num_members: int
    keys: dict[int, int]
    drawn: Ref | None


@dataclasses.dataclass
class Operation:
    """One operation: ``args`` and ``kwargs`` hold a :class:`Ref` where a tensor was."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outs: list[Ref]
    writes: list[Ref]  # arguments that it changes in place

    @property
    def name(self) -> str:
        """The operation without its overload: ``aten.add``, ``fastens.conv``."""
        return str(self.func).rpartition(".")[0]

    @functools.cached_property
    def reads(self) -> list[Ref]:
        """The tensors among the arguments."""
        found: list[Ref] = []
        mapped(Ref, lambda ref: found.append(ref), (self.args, self.kwargs))
        return found


def mapped(kind: type | UnionType, function: Callable[[Any], Any], tree: Any) -> Any:
    """The arguments of an operation with ``function`` applied to every leaf of one kind."""
    if isinstance(tree, kind):
        return function(tree)
    if isinstance(tree, list | tuple):
        items = [mapped(kind, function, item) for item in tree]
        if type(tree) is list:
            return items
        return getattr(type(tree), "_make", tuple)(items)
    if isinstance(tree, dict):
        return {key: mapped(kind, function, item) for key, item in tree.items()}
    return tree


class Recording:
    """The operations of a pass that depend on its inputs; whatever else they read is constant.

    Attributes:
        operations: the operations, views left out.
        inputs: one per input of the pass.
        outputs: one per tensor that it returned.
        tensors: a tensor of every storage, by which a constant is read.
        row_members: of a pass whose rows are dealt out anew in every call, the input with the member of each row.
        masks: of a pass under dropout masks.

    Args:
        sketch: what stands for the result of an operation on values, or returns none to have it computed; without it
            everything is computed.
    """

    def __init__(self, sketch: Sketch | None = None) -> None:
        self._sketch = sketch
        self.operations: list[Operation] = []
        self.inputs: list[Ref] = []
        self.outputs: list[Ref] = []
        self.tensors: dict[int, Tensor] = {}
        self.row_members: Ref | None = None
        self.masks: MaskInputs | None = None
        self._made: set[int] = set()  # storages that depend on the inputs
        self._fresh: set[int] = set()  # storages that the pass made, and that do not depend on the inputs
        self._first: dict[int, int] = {}  # where an input begins in its storage
        self._keep: list[Any] = []

    def ref(self, x: Tensor) -> Ref:
        """A reference to a tensor by its storage, which is kept alive so that no other tensor gets its address."""
        key = x.untyped_storage()._cdata
        if key not in self.tensors:
            self.tensors[key] = x
            self._keep.append(x.untyped_storage())
        return Ref(key, int(x.storage_offset()) - self._first.get(key, 0), tuple(x.shape), tuple(x.stride()), x.dtype)

    def result(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of an operation, computed or sketched."""
        made = (isinstance(x, Tensor) and x.untyped_storage()._cdata in self._made for x in args)
        sketched = self._sketch(func, args, kwargs) if self._sketch is not None and any(made) else None
        return func(*args, **kwargs) if sketched is None else sketched

    def constant(self, ref: Ref) -> Tensor | None:
        """The tensor of a reference that does not depend on the inputs, none where it does."""
        if ref.storage in self._made:
            return None
        base = self.tensors[ref.storage]
        return torch.empty(0, dtype=ref.dtype, device=base.device).set_(
            base.untyped_storage(), ref.offset, ref.size, ref.stride
        )

    def found(self) -> list[Tensor]:
        """Constants that were there before the pass: weights, and tensors in attributes, lists and globals."""
        inputs = {ref.storage for ref in self.inputs}
        return [x for key, x in self.tensors.items() if key not in self._made | self._fresh | inputs]

    def depends(self, x: Tensor) -> bool:
        """Whether a tensor depends on the inputs."""
        return x.untyped_storage()._cdata in self._made

    def input(self, x: Tensor) -> Ref:
        """What a tensor of the call is; a plan gets it by its first element, wherever that is in its storage."""
        self._first[x.untyped_storage()._cdata] = int(x.storage_offset())
        return self.ref(x)

    def add_input(self, x: Tensor) -> None:
        """A further input, which the pass came to need."""
        self.inputs.append(self.input(x))
        self._made.add(self.inputs[-1].storage)

    def before(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Let what an operation is about to overwrite depend on the inputs, where that has to be recorded.

        This is of a constant that the pass itself made: one that receives what depends on the inputs, or that an
        operation has read as it is.
        """
        if not func._schema.is_mutable or torch.Tag.inplace_view in func.tags:
            return
        ref_args, ref_kwargs = mapped(Tensor, self.ref, (args, kwargs))
        op = Operation(func, ref_args, ref_kwargs, [], [])
        depends = any(ref.storage in self._made for ref in op.reads)
        for written in self._written(func, ref_args, ref_kwargs):
            key = written.storage
            if key in self._fresh and (depends or any(r.storage == key for n in self.operations for r in n.reads)):
                self._depend(written)

    def _depend(self, written: Ref) -> None:
        """Record a copy of a constant where the constant is, so that its storage depends on the inputs from now on."""
        key = written.storage
        base = self.tensors[key]
        count = base.untyped_storage().nbytes() // written.dtype.itemsize
        same = written if written.numel == count and not written.offset else None
        whole = same or Ref(key, 0, (count,), (1,), written.dtype)
        with _disable_current_modes():
            kept = torch.empty(0, dtype=written.dtype, device=base.device)
            kept = kept.set_(base.untyped_storage().clone(), 0, whole.size, whole.stride)
        snapshot = self.ref(kept)

        def earlier(ref: Ref) -> Ref:
            return dataclasses.replace(ref, storage=snapshot.storage) if ref.storage == key else ref

        for op in self.operations:
            if any(ref.storage == key for ref in op.reads):
                op.args, op.kwargs = mapped(Ref, earlier, (op.args, op.kwargs))
                del op.reads
        self.operations.append(Operation(torch.ops.aten.clone.default, (snapshot,), {}, [whole], []))
        self._fresh.discard(key)
        self._made.add(key)

    def add(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Keep an operation that depends on the inputs, unless it only makes views.

        Raises:
            NotRecordable: it is random, or depends on the values of the inputs, or changes a constant.
        """
        if torch.Tag.inplace_view in func.tags:
            depends = any(isinstance(x, Tensor) and self.depends(x) for x in args)
            if depends and (func.namespace != "aten" or func._schema.name in _OTHER_MEMORY):
                raise NotRecordable(f"{func} gives a tensor other memory")
            return  # another view of the same memory
        ref_args, ref_kwargs = mapped(Tensor, self.ref, (args, kwargs))
        outs: list[Ref] = []
        mapped(Tensor, lambda x: outs.append(self.ref(x)), result)
        op = Operation(func, ref_args, ref_kwargs, outs, self._written(func, ref_args, ref_kwargs))
        if torch.Tag.nondeterministic_seeded in func.tags and not _without_dropout(func, args, kwargs):
            raise NotRecordable(f"{op.name} draws random numbers")
        reads = op.reads
        if not any(ref.storage in self._made for ref in reads):
            self._fresh.update({ref.storage for ref in outs} - {ref.storage for ref in reads})
            return
        dynamic = torch.Tag.dynamic_output_shape in func.tags and not _indexes_by_numbers(op)
        if torch.Tag.data_dependent_output in func.tags or dynamic or not outs:
            raise NotRecordable(f"{op.name} depends on the values of the input")
        if any(ref.storage not in self._made for ref in op.writes):
            raise NotRecordable(f"{op.name} changes a constant in place")
        read = {ref.storage for ref in reads}
        if not op.writes and all(out.storage in read for out in outs):
            return
        self._made.update(out.storage for out in outs)
        self.operations.append(op)

    @staticmethod
    def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Ref]:
        written = []
        for i, argument in enumerate(func._schema.arguments if func._schema.is_mutable else ()):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[i] if i < len(args) else kwargs.get(argument.name)
                written += [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Ref)]
        return written


def _without_dropout(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation is random only by its dropout, which is off."""
    names = [argument.name for argument in func._schema.arguments]
    return "dropout_p" in names and {**dict(zip(names, args, strict=False)), **kwargs}.get("dropout_p", 0.0) == 0.0


def _indexes_by_numbers(op: Operation) -> bool:
    """Whether an indexing operation has no mask, so that the shape of its result is known."""
    masks = [leaf for leaf in pytree.tree_leaves(op.args[1:2]) if isinstance(leaf, Ref)]
    return op.name == "aten.index" and all(ref.dtype not in (torch.bool, torch.uint8) for ref in masks)


def channels_last(x: Tensor, result: Tensor, convolved: bool) -> Tensor:
    """A result in the layout that the steps write, so that what follows is recorded in that layout."""
    if result.ndim == 4:
        return result.contiguous(memory_format=torch.channels_last)
    if convolved and result.ndim == 3:
        return result.transpose(1, 2).contiguous().transpose(1, 2)
    if result.shape == x.shape and result.stride() != x.stride() and x.stride(1) == 1:  # tokens seen as [R, C, L]
        return torch.empty_like(x).copy_(result)
    return result


def _is_channels_last(x: Any) -> bool:
    return isinstance(x, Tensor) and x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)


# a view that has its values conjugated or negated as they are read has no place where they are
_RESOLVED = {
    torch.ops.aten._conj.default: torch.ops.aten._conj_physical.default,
    torch.ops.aten._neg_view.default: torch.ops.aten.neg.default,
}


class _Operations(TorchDispatchMode):
    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording = recording

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(t.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl for t in types):
            return NotImplemented  # a wrapper in a scripted function or an extension: its own handler comes first
        kwargs = kwargs or {}
        func = _RESOLVED.get(func, func)
        self.recording.before(func, args, kwargs)
        result = self.recording.result(func, args, kwargs)
        if func is torch.ops.aten.convolution.default:
            result = channels_last(args[0], result, True)
        elif func is torch.ops.aten.native_group_norm.default:
            result = (channels_last(args[0], result[0], False), *result[1:])
        self.recording.add(func, args, kwargs, result)
        return result


# what acts on the last dimension writes it contiguous, whatever the others are
_OF_VECTORS = {"fastens::linear", "fastens::layer_norm", "fastens::rms_norm"}


class _MemberOps(TorchFunctionMode):
    """Member-batched ops are recorded whole; as composites they would come to the dispatcher in pieces."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording = recording

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.contiguous and len(args) == 1 and not kwargs and _is_channels_last(args[0]):
            return args[0]  # asked for by networks whose images are in another layout when they run by themselves
        if isinstance(func, torch._ops.OpOverloadPacket):
            func = func.default
        if not isinstance(func, torch._ops.OpOverload) or func.namespace != "fastens":
            return func(*args, **kwargs)
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
            return func(*args, **kwargs)  # the network differentiates: in pieces, whose derivatives are recorded too
        with _disable_current_modes():
            convolved = func is torch.ops.fastens.conv.default
            result = self.recording.result(func, args, kwargs)
            if func is torch.ops.fastens.dropout.default:
                result = torch.empty_like(args[0]).copy_(result)
            elif func._schema.name in _OF_VECTORS:
                result = result.contiguous()
            else:
                result = channels_last(args[0], result, convolved)
        self.recording.add(func, args, kwargs, result)
        return result


_IN_PROGRESS: contextvars.ContextVar[Recording | None] = contextvars.ContextVar("recording", default=None)


def in_progress() -> Recording | None:
    """The recording that is made in this context."""
    return _IN_PROGRESS.get()


def record(run: Callable[[], Any], inputs: list[Tensor], sketch: Sketch | None = None) -> tuple[Recording, Any]:
    """Run a pass and record it.

    Args:
        run: the pass.
        inputs: the tensors that may differ from call to call.
        sketch: see :class:`Recording`; what the pass returns is then made up.

    Returns:
        The recording and what the pass returned.

    Raises:
        NotRecordable: see :class:`Recording`.
    """
    recording = Recording(sketch)
    recording.inputs = [recording.input(x) for x in inputs]
    recording._made.update(ref.storage for ref in recording.inputs)
    # in inference mode an operation that is made of others would come whole
    modes = _Operations(recording), _MemberOps(recording)
    with scope(_IN_PROGRESS, recording), torch.inference_mode(False), torch.no_grad(), modes[0], modes[1], insisted():
        result = run()
    recording.outputs = [recording.ref(leaf) for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
    return recording, result


def trace_of(recording: Recording) -> list[str]:
    """What the operations of a recording are and read, one line each: two of one pass differ where that changed."""

    def described(leaf: Ref) -> str:
        constant = recording.constant(leaf)
        if constant is None:
            return f"{list(leaf.size)}"
        wide = torch.complex128 if constant.is_complex() else torch.float64
        total = constant.detach().to(wide).sum().item() if constant.numel() else 0.0
        return f"constant {list(leaf.size)} that adds up to {total:.17g}"

    return [f"{op.name}{mapped(Ref, described, (op.args, op.kwargs))}" for op in recording.operations]
