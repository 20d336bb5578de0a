"""What a recorded pass rests on beside its arguments, and how a change of it is noticed."""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as module_hooks
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._device import DeviceContext

from fastens.fold.tables import Stacks

_VERSION = operator.attrgetter("_version")


def _versions(tensors: list[Tensor]) -> int:
    """How often tensors were written to, as far as torch counts; those made in inference mode have no count."""
    try:
        return sum(map(_VERSION, tensors))
    except RuntimeError:
        return sum(0 if t.is_inference() else t._version for t in tensors)


class Barrier:
    """Counts what is written to the Python state of a network: attributes of modules, and entries of their tables.

    Attributes:
        writes: how many.
        names: the attributes, each with the identity of its module; emptied by who has looked at them.
    """

    def __init__(self) -> None:
        self.writes = 0
        self.names: set[tuple[int, str]] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> Barrier:
        return Barrier()


class Watched(nn.Module):
    """A module whose attributes cannot change unnoticed; see :func:`watch`."""

    def __setattr__(self, name: str, value: Any) -> None:
        _written(self, name)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        _written(self, name)
        super().__delattr__(name)


def _written(module: nn.Module, name: str) -> None:
    barrier = module.__dict__.get("_barrier")  # none while a copy is being made
    if barrier is not None:
        barrier.writes += 1
        barrier.names.add((id(module), name))


@functools.cache
def _watched(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass that differs from a class in nothing but that it counts writes."""
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__, "watches": kind}
    return type(kind.__name__, (Watched, kind), names)


def watch(network: nn.Module, barrier: Barrier) -> None:
    """Let every module of a network, and its tables, count writes."""
    for module in network.modules():
        module.__dict__["_barrier"] = barrier
        for table in (module._parameters, module._buffers):
            if isinstance(table, Stacks):
                table.barrier = barrier
        if not isinstance(module, Watched):
            module.__class__ = _watched(type(module))


def unwatched(module: nn.Module) -> nn.Module:
    """The same module, of the class that it had."""
    for each in module.modules():
        if isinstance(each, Watched):
            each.__class__ = class_of(each)
        each.__dict__.pop("_barrier", None)
    return module


def class_of(module: nn.Module) -> type[nn.Module]:
    """The class that a module has for its author."""
    return type(module).watches if isinstance(module, Watched) else type(module)  # pyright: ignore[reportAttributeAccessIssue]


class Guards:
    """The state of a network that recorded passes rest on.

    Args:
        network: the folded network.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self.barrier = Barrier()
        watch(network, self.barrier)
        self.look()

    def look(self) -> None:
        """List the tensors and hooks of the network as it is now."""
        watch(self._network, self.barrier)
        self.tensors: list[Tensor] = [
            tensor
            for module in self._network.modules()
            for table in (module._parameters, module._buffers)
            for tensor in table.values()
            if tensor is not None
        ]
        self._hooks = [h for m in self._network.modules() for h in (m._forward_hooks, m._forward_pre_hooks)]
        self._seen = self.barrier.writes

    def state(self) -> tuple[Any, ...]:
        """What changes with weights and Python state: writes, versions, where each tensor is, and the default dtype."""
        if self.barrier.writes != self._seen:
            self.look()
        tensors = self.tensors
        return self.barrier.writes, _versions(tensors), tuple(map(Tensor.data_ptr, tensors)), torch.get_default_dtype()

    def hooked(self) -> bool:
        """Whether hooks want to be called."""
        return any(self._hooks) or bool(module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks)


def ordinary_context(device: str) -> bool:
    """Whether nothing in this context changes what functions do: autocast, modes, forward derivatives."""
    return not torch.is_autocast_enabled(device) and unmodified_context(device)


def unmodified_context(device: str) -> bool:
    """Whether no mode and no transform is in this context, but for a default device of this kind."""
    return not transformed() and all(
        isinstance(mode, DeviceContext) and mode.device.type == device
        for mode in map(torch._C._get_function_stack_at, range(torch._C._len_torch_function_stack()))
    )


def transformed() -> bool:
    """Whether a function transform or forward-mode differentiation is in progress: members' own code serves those."""
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def _count_fused_steps(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Count a fused optimizer's writes, which torch's version counters do not see."""
    for group in optimizer.param_groups:
        if group.get("fused"):
            for parameter in group["params"]:
                if parameter.grad is not None:
                    torch.autograd.graph.increment_version(parameter)


register_optimizer_step_post_hook(_count_fused_steps)
