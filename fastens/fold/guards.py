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
from fastens.fold.weights import Weights


class Barrier:
    """Counts what is written to the Python state of a network: attributes of modules, and entries of their tables."""

    def __init__(self) -> None:
        self.writes = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Barrier:
        return Barrier()


class Watched(nn.Module):
    """A module whose attributes cannot change unnoticed; see :func:`watch`."""

    def __setattr__(self, name: str, value: Any) -> None:
        _written(self)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        _written(self)
        super().__delattr__(name)


def _written(module: nn.Module) -> None:
    barrier = module.__dict__.get("_barrier")  # none while a copy is being made
    if barrier is not None:
        barrier.writes += 1


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
        self._weights = Weights([])
        self.barrier = Barrier()
        watch(network, self.barrier)
        self.look()

    def look(self) -> None:
        """List the tensors and hooks of the network as it is now."""
        watch(self._network, self.barrier)
        tensors: list[Tensor] = [
            tensor
            for module in self._network.modules()
            for table in (module._parameters, module._buffers)
            for tensor in table.values()
            if tensor is not None
        ]
        if len(tensors) != len(self.tensors) or not all(map(operator.is_, tensors, self.tensors)):
            self._weights = Weights(tensors)
        self._hooks = [h for m in self._network.modules() for h in (m._forward_hooks, m._forward_pre_hooks)]
        self._seen = self.barrier.writes

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors of the network."""
        return self._weights.tensors

    def state(self) -> tuple[int, Any]:
        """What changes with Python state, and what changes with weights."""
        if self.barrier.writes != self._seen:
            self.look()
        return self.barrier.writes, self._weights.state()

    def hooked(self) -> bool:
        """Whether hooks want to be called."""
        return any(self._hooks) or bool(module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks)


def ordinary_context(device: str) -> bool:
    """Whether nothing in this context changes what functions do: autocast, modes, forward derivatives."""
    return not torch.is_autocast_enabled(device) and unmodified_context(device)


def unmodified_context(device: str) -> bool:
    """Whether no mode and no transform is in this context, but for a default device of this kind."""
    if transformed():
        return False
    for i in range(torch._C._len_torch_function_stack()):
        mode = torch._C._get_function_stack_at(i)
        if not isinstance(mode, DeviceContext) or mode.device.type != device:
            return False
    return True


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
