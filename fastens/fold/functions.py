"""Hand-written ``autograd.Function``s of a network: one node in the graph of the stacks, whose code sees one member's.

``Function.apply`` is no torch function, so no mode is told of it: applied to what differs between members it would
differentiate the wrappers, which have no graph. Torch calls the ``apply`` of the class behind ``Function``, which is
ours from this module on: torch's own, but for what a network differentiates in a pass of all members.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, FunctionCtx
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import CheckpointFunction, checkpoint

from fastens.fold.callsite import check_derivatives
from fastens.fold.dispatch import Fold, current_fold, inside
from fastens.fold.nested import leaves_of, plain
from fastens.fold.stand_ins import tracing
from fastens.fold.tensor import MemberTensor, NotFoldable, member_valued
from fastens.refusals import insisted
from fastens.scopes import scope

_Unpacked = Mapping[int, tuple[Any, ...]]  # saved tensors, by the identity of a context
_UNPACKED: contextvars.ContextVar[_Unpacked] = contextvars.ContextVar("unpacked", default=MappingProxyType({}))


class Context(FunctionCtx):
    """What a Function's code sees as ``ctx``: tensors of one member's shapes, and whatever it puts there.

    Attributes:
        needs_input_grad: for each argument, whether gradients are asked for.
    """

    needs_input_grad: tuple[bool, ...] = ()

    @property
    def saved_tensors(self) -> tuple[Any, ...]:
        """What the forward saved; there in a backward alone."""
        found = _UNPACKED.get().get(id(self))
        if found is None:
            raise RuntimeError("saved tensors of an autograd.Function in a pass of all members are there in a backward")
        return found


class Call:
    """One call of a Function by a network.

    Args:
        fold: the pass.
        function: the class.
        args: of the call, as the network gave them.
    """

    def __init__(self, fold: Fold, function: type[Function], args: tuple[Any, ...]) -> None:
        self._fold, self._function = fold, function
        self._args: tuple[Any, ...] = args
        self._shapes = [x.shape if isinstance(x, Tensor) else None for x in args]
        self._calls = fold.dropouts.counted()
        self._context = Context()
        self._saved: list[tuple[Any, bool] | None] = []  # hidden dimension, none of a common one; whether it aliases
        self._returned: list[Any] = []

    def run(self) -> Any:
        """What the network gets."""
        fold = self._fold
        with torch._C.DisableTorchFunction():
            given = [self._differentiated(x) if isinstance(x, Tensor) else x for x in self._args]
        found = _OfMembers.apply(self, *given)
        returned, self._returned, self._args = self._returned, [], ()
        outputs = found if isinstance(found, tuple) else (found,)
        results = [
            mine if mine is not None else fold.wrap(x) if isinstance(x, Tensor) else x
            for x, mine in zip(outputs, returned, strict=True)
        ]
        return tuple(results) if isinstance(found, tuple) else results[0]

    def _differentiated(self, x: Tensor) -> Tensor:
        """An argument as the graph has it, [N, ...]: each member's gradient goes through the Function's own code."""
        return self._fold.entries(x) if x.requires_grad else plain(x) if not member_valued(x) else self._fold.stack(x)

    def forward(self, node: Any, given: tuple[Any, ...]) -> Any:
        """Run the Function's forward on wrappers, and give the graph the stacks."""
        fold, context, function, args = self._fold, self._context, self._function, self._args
        context.needs_input_grad = tuple(node.needs_input_grad[1:])
        with inside(fold):
            if function.setup_context is not Function.setup_context:
                output: Any = function.forward(*args)
                function.setup_context(context, args, output)
            else:
                output = function.forward(context, *args)
        check_derivatives(leaves_of(output))
        outputs = output if isinstance(output, tuple) else (output,)
        with torch._C.DisableTorchFunction():
            stacks = {id(x): own for x, own in zip(args, given, strict=True) if isinstance(x, Tensor)}
            dirty = [self._written(x, stacks) for x in vars(context).pop("dirty_tensors", ())]
            self._returned = [x if any(stacks.get(id(x)) is y for y in dirty) else None for x in outputs]
            for x in outputs:
                if isinstance(x, Tensor) and not (id(x) in stacks and stacks[id(x)].ndim == x.ndim + 1):
                    stacks[id(x)] = fold.stack(x) if member_valued(x) else fold.entries(x).clone()
            self._save(node, {id(x) for x in outputs}, stacks)
            node.mark_dirty(*dirty)
            node.mark_non_differentiable(*(stacks[id(x)] for x in vars(context).pop("non_differentiable", ())))
            node.set_materialize_grads(vars(context).pop("materialize_grads", True))
            results = tuple(stacks[id(x)] if isinstance(x, Tensor) else x for x in outputs)
        return results if isinstance(output, tuple) else results[0]

    def _written(self, x: Any, stacks: dict[int, Any]) -> Tensor:
        """The stack of an argument that the forward wrote to."""
        own = stacks.get(id(x))
        if own is None or not member_valued(x) or not self._fold.aliases(x) or x.stack is not own:
            raise NotFoldable(f"{self._function.__name__} writes to what is the same for all members, or to a copy")
        return own

    def _save(self, node: Any, outputs: set[int], stacks: dict[int, Any]) -> None:
        """Save for the backward what the Function's code saves."""
        kept: list[Tensor | None] = []
        for x in vars(self._context).pop("to_save", ()):
            if x is None:
                kept.append(None)
                self._saved.append(None)
            elif id(x) in outputs:  # whose derivatives are those of the node
                kept.append(stacks[id(x)])
                self._saved.append((self._fold.hidden, True))
            else:
                wrapped = isinstance(x, MemberTensor)
                kept.append(x.stack if wrapped else x)
                self._saved.append((x.hidden, x.alias) if wrapped else (None, True))
        node.save_for_backward(*kept)

    def _unpacked(self, node: Any) -> tuple[Any, ...]:
        tensors = node.saved_tensors if self._saved else ()
        with torch._C.DisableTorchFunction():
            return tuple(
                None if how is None else self._fold.common(x) if how[0] is None else MemberTensor(x, *how)
                for x, how in zip(tensors, self._saved, strict=True)
            )

    def backward(self, node: Any, grads: tuple[Any, ...]) -> tuple[Any, ...]:
        """Run the Function's backward on wrappers of the stacks' gradients."""
        fold, function, context = self._fold, self._function, self._context
        code: Callable[..., Any] = function.vjp if function.vjp is not Function.vjp else function.backward
        unpacked = {**_UNPACKED.get(), id(context): self._unpacked(node)}
        with torch._C.DisableTorchFunction():
            given = [fold.wrap(x) if isinstance(x, Tensor) else x for x in grads]
        boxed = getattr(function, "boxed_grads_call", False)
        seeds, fold.seeds = fold.seeds, None  # it may have been seeded since the pass
        try:
            with scope(_UNPACKED, unpacked), inside(fold, self._calls), insisted():
                found = code(context, given) if boxed else code(context, *given)
                found = found if isinstance(found, tuple) else (found,)
                check_derivatives(leaves_of(found))
                fitting = [self._fitted(x, i) for i, x in enumerate(found)]
        except NotFoldable as error:
            raise type(error)(
                f"the backward of {function.__name__}: {error}; it is of all members at once: pass engine='loop'"
            ) from error
        finally:
            fold.seeds = seeds
        with torch._C.DisableTorchFunction():
            return tuple(fold.entries(x) if isinstance(x, Tensor) else x for x in fitting)

    def _fitted(self, x: Any, i: int) -> Any:
        """A gradient in its argument's shape, to which torch sums what was broadcast."""
        shape = self._shapes[i] if i < len(self._shapes) else None
        fits = not isinstance(x, Tensor) or shape is None or x.shape == shape
        return x if fits else self._fold.again(Tensor.sum_to_size, x, shape)


class _OfMembers(Function):
    """The node of a call, between stacks."""

    @staticmethod
    def forward(ctx: Any, call: Call, *given: Any) -> Any:
        """Return stacks [N, ...], and what is no tensor as it is."""
        ctx.call = call
        return call.forward(ctx, given)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Return gradients of the stacks."""
        return None, *ctx.call.backward(ctx, grads)


def _checkpointed(run: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
    """A reentrant checkpoint as one that is not: its backward calls torch's engine on what its function gives."""
    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)


_ALIKE: dict[type, Callable[..., Any]] = {CheckpointFunction: _checkpointed}
_BEHIND: Any = Function.__mro__[1]


def _apply(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
    """What a Function gives: in a pass whose values are differentiated, for all members at once."""
    fold = None if cls is _OfMembers else _pass_of(args)
    if fold is None or kwargs or not torch.is_grad_enabled():
        return super(_BEHIND, cls).apply(*args, **kwargs)
    if not any(isinstance(x, Tensor) and x.requires_grad for x in args):
        return super(_BEHIND, cls).apply(*args, **kwargs)
    if tracing() or torch.compiler.is_compiling():
        raise NotFoldable(f"{cls.__name__} of the network differentiates by its own code, which no trace holds")
    if cls in _ALIKE:
        return _ALIKE[cls](*args)
    fold.functions.add(cls)
    return Call(fold, cls, args).run()


def _pass_of(args: tuple[Any, ...]) -> Fold | None:
    """The pass of whose network's code this is; rules, which apply Functions to stacks, run outside its mode."""
    fold = current_fold()
    if fold is not None:
        return fold if fold in _get_current_function_mode_stack() else None
    return Fold.of(args, {}) if any(map(member_valued, args)) else None


_BEHIND.apply = classmethod(_apply)
