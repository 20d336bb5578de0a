"""What a recorded pass rests on beside its arguments, and how a change of it is noticed."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.nn.modules import module as module_hooks
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from fastens.fold.callsite import saved_through_hooks
from fastens.fold.tensor import modules_of, tensors_of
from fastens.network.barrier import HOOKS, Barrier, counts, watch
from fastens.network.parametrized import any_parametrized, caching
from fastens.network.surroundings import Surroundings
from fastens.network.weights import Weights


class Guards:
    """The state of a network that recorded passes rest on.

    Args:
        network: the folded network.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._weights = Weights([])
        self._with_memory: Any = None  # the state of the weights that was found to have memory
        self.barrier = Barrier()
        self._surroundings = Surroundings(network)
        self.look()

    def look(self) -> None:
        """List the tensors and hooks of the network as it is now."""
        seen = self.barrier.writes
        watch(self._network, self.barrier)
        tensors: list[Tensor] = [
            tensor
            for _, module in modules_of(self._network)
            for table in (module._parameters, module._buffers)
            for tensor in table.values()
            if tensor is not None
        ]
        if len(tensors) != len(self.tensors) or not all(map(operator.is_, tensors, self.tensors)):
            self._weights = Weights(tensors)
        self._look_for_hooks()
        self._surroundings.changed()
        self._seen = seen

    def _look_for_hooks(self) -> None:
        """List the tables that have hooks, or do not tell when they get one."""
        seen = self.barrier.hooks
        tables = [vars(module)[name] for _, module in modules_of(self._network) for name in HOOKS]
        self._hooks = [table for table in tables if table or not counts(table)]
        self._seen_hooks = seen

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors of the network."""
        return self._weights.tensors

    @property
    def parameters(self) -> list[Tensor]:
        """Those that are parameters."""
        return [x for x in self.tensors if isinstance(x, nn.Parameter)]

    def state(self) -> tuple[int, Any, torch.dtype, int]:
        """What changes with Python state, with weights, with the default dtype, and with what else code reads."""
        if self.barrier.writes != self._seen:
            self.look()
        return self._seen, self._weights.state(), torch.get_default_dtype(), self.read

    @property
    def read(self) -> int:
        """What changes with what code reads beside attributes of modules."""
        return self._surroundings.state()

    def names(self) -> frozenset[str]:
        """Those in the code that the network runs."""
        return self._surroundings.names()

    def observed(self) -> bool:
        """Whether members' own code is to run: for others to see it, or to keep weights that it computes."""
        return observed() or self._keeps_weights()

    def ordinary_context(self, device: str) -> bool:
        """Whether nothing in this context changes what functions do, nor what weights are that members compute."""
        return ordinary_context(device) and not self._keeps_weights()

    def _keeps_weights(self) -> bool:
        return caching() and any_parametrized(module for _, module in modules_of(self._network))

    def check_memory(self) -> None:
        """Look whether all weights have values, where they are others than when it was looked last.

        Raises:
            ValueError: ``weight.data`` of one that all members share was set to values that differ between them.
        """
        state = self._weights.state()
        if state == self._with_memory:
            return
        if any(map(_lacks_memory, self.tensors)):
            lacking = [name for name, x in tensors_of(self._network).items() if _lacks_memory(x)]
            raise ValueError(
                f"{', '.join(lacking[:3])}: `.data` of a weight that all members share was set to values that differ "
                "between them, which it cannot hold: call the method that does so on the ensemble"
            )
        self._with_memory = state

    def hooked(self) -> bool:
        """Whether hooks want to be called."""
        if self.barrier.hooks != self._seen_hooks:
            self._look_for_hooks()
        return any(self._hooks) or bool(module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks)


def _lacks_memory(tensor: Tensor) -> bool:
    """Whether a tensor took the data of a wrapper, which has none."""
    if tensor.is_meta or not tensor.numel() or tensor.layout is not torch.strided:
        return False
    try:
        return not tensor.data_ptr()
    except RuntimeError:
        return True


def ordinary_context(device: str) -> bool:
    """Whether nothing in this context changes what functions do: autocast, modes, forward derivatives."""
    return not torch.is_autocast_enabled(device) and unmodified_context(device)


def unmodified_context(device: str) -> bool:
    """Whether no mode and no transform is in this context, but for a default device of this kind and our own."""
    if transformed() or (torch._C._len_torch_dispatch_stack() and _dispatched_by_others()):
        return False
    for i in range(torch._C._len_torch_function_stack()):
        mode = torch._C._get_function_stack_at(i)
        if not isinstance(mode, DeviceContext) or mode.device.type != device:
            return False
    return True


def _dispatched_by_others() -> bool:
    return any(_owner(mode) != "fastens" for mode in _get_current_dispatch_mode_stack())


def _owner(mode: Any) -> str:
    return type(mode).__module__.partition(".")[0]


def transformed() -> bool:
    """Whether a function transform or forward-mode differentiation is in progress: members' own code serves those."""
    return forward_ad._current_level >= 0 or peek_interpreter_stack() is not None


def observed() -> bool:
    """Whether somebody is to see what members call or save: a transform, a mode or hook that is not torch's or ours."""
    modes = [torch._C._get_function_stack_at(i) for i in range(torch._C._len_torch_function_stack())]
    if torch._C._len_torch_dispatch_stack():
        modes += _get_current_dispatch_mode_stack()
    if transformed() or any(_owner(mode) not in ("torch", "fastens") for mode in modes):
        return True
    return torch.is_grad_enabled() and saved_through_hooks()


def refuse_tracers() -> None:
    """Raise where a tracer records what this thread does, plans and checks among it, that no compiler's own call is.

    Raises:
        RuntimeError: ``torch.jit.trace`` or ``make_fx`` is in progress.
    """
    proxies = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
    if (proxies or torch._C._is_tracing()) and not torch.compiler.is_compiling():
        if transformed():
            raise RuntimeError(
                "torch.func.linearize does not see through an ensemble: call torch.func.jvp, which runs the members"
            )
        raise RuntimeError(
            f"{'make_fx' if proxies else 'torch.jit.trace'} does not see through an ensemble: export it first, and "
            "trace torch.export.export(ens, args).module()"
        )


def modes() -> tuple[bool, bool, bool]:
    """What members' Python may ask torch for and answer by: gradients, inference mode, deterministic algorithms."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.are_deterministic_algorithms_enabled(),
    )


EVERY_MODE = list(itertools.product((False, True), repeat=3))  # that :func:`modes` tells apart


@contextmanager
def in_modes(modes: tuple[bool, bool, bool]) -> Iterator[None]:
    """Scope of gradients and of inference mode as they were; see :func:`modes`."""
    grad, inference, _ = modes
    with torch.inference_mode(inference), torch.set_grad_enabled(grad):
        yield


def _count_fused_steps(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Count a fused optimizer's writes, which torch's version counters do not see."""
    for group in optimizer.param_groups:
        if group.get("fused"):
            for parameter in group["params"]:
                if parameter.grad is not None:
                    torch.autograd.graph.increment_version(parameter)


register_optimizer_step_post_hook(_count_fused_steps)
