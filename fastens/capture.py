"""Recorded steps: the evaluation of an ensemble as one CUDA graph per signature, with eager code where none fits."""

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fastens import reproducible
from fastens.device import capturing, convolution_precision, copy_given, device_of, product_precision
from fastens.engine.arguments import Arguments
from fastens.engine.compiled import drawn_pass
from fastens.engine.guards import Guards, unmodified_context
from fastens.internal import engine_of
from fastens.kernels._graph import record_graph
from fastens.network.weights import as_it_is
from fastens.report import CallReport


def settings(kind: str) -> tuple[Any, ...]:
    """What launches on this kind of device depend on beside a model: autocast, precisions, deterministic mode."""
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return autocast, product_precision(), convolution_precision(), reproducible.enabled()


def may_replay(kind: str) -> bool:
    """Whether nobody is told of functions and operations in this context, and no graph is recorded in it."""
    return unmodified_context(kind) and not capturing()


class Facts:
    """What a recording of a model rests on: its tensors, which are kept alive, Python state, and deterministic mode.

    Args:
        model: an ensemble, or a module that holds some.
    """

    def __init__(self, model: nn.Module) -> None:
        self._tensors = [*model.parameters(), *model.buffers()]
        self._state = reproducible.enabled(), _state_of(model)

    def hold(self, model: nn.Module) -> bool:
        """Whether all is as it was, and nobody wants to be told of calls, as hooks do."""
        return not _hooked(model) and (reproducible.enabled(), _state_of(model)) == self._state


def _guards_of(model: nn.Module) -> list[Guards]:
    engine = engine_of(model)
    if engine is not None:
        return [engine.plans.guards]
    engines = (engine_of(m) for m in model.modules())
    return [engine.plans.guards for engine in engines if engine is not None]


def _state_of(model: nn.Module) -> Any:
    """Return what changes when weights or state change: an ensemble's guards, any other module's tensors."""
    states = [guards.state() for guards in _guards_of(model)]
    if engine_of(model) is not None:
        return states
    tensors = [*model.parameters(), *model.buffers()]
    return states, [(id(t), as_it_is(t)) for t in tensors]


def _hooked(model: nn.Module) -> bool:
    return any(guards.hooked() for guards in _guards_of(model))


class RecordedStep:
    """One recording: inputs that it reads, outputs that it writes, and the weights that it keeps alive.

    Args:
        run: called with positional and keyword arguments, evaluates the ensemble.
        args: the example's positional arguments.
        kwargs: its keyword arguments.
        model: the ensemble.

    Attributes:
        call: the signature as a report prints it.
    """

    def __init__(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], model: Any) -> None:
        device, arguments = model.device, Arguments(args, kwargs)
        # CPU tensors, such as a scheduler's timesteps, become device memory: a graph cannot read them anew.
        self.inputs = [
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device) for x in arguments.tensors
        ]
        self._read(arguments)
        static_args, static_kwargs = arguments.with_tensors(self.inputs).call
        self.call = arguments.described()
        self._facts = Facts(model)
        self.replay, self.output = record_graph(lambda: run(static_args, static_kwargs), device)
        self._lock = threading.Lock()
        self._turns = device_of(device).turns()

    def is_current(self, model: nn.Module) -> bool:
        """Whether weights and state are those that were recorded."""
        return self._facts.hold(model)

    def _read(self, arguments: Arguments) -> None:
        for static, given in zip(self.inputs, arguments.tensors, strict=True):
            copy_given(static, given)

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Copy the arguments in, replay, and return copies: no later call writes to what was returned."""
        with self._lock, self._turns:
            self._read(Arguments(args, kwargs))
            self.replay()
            return pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, self.output)


class Capturing(nn.Module):
    """An ensemble's recordings: a call that matches one is replayed, any other is evaluated as usual."""

    def capture(self: Any, *args: Any, **kwargs: Any) -> None:
        """Record the evaluation of these arguments as a CUDA graph; calls of the same signature replay it from then on.

        The signature is shapes, strides, dtypes and devices of tensors, the values of everything else, the rule,
        autocast, and the precision of float32 products. A recording is replayed in evaluation mode under
        ``torch.no_grad`` only, and what it returns is the caller's. After a change of weights or of the members' Python
        state it is not replayed any more, since it may hold what was derived from them: capture again. After a change
        that cannot be noticed, :meth:`refresh` forgets it.

        Raises:
            RuntimeError: the ensemble is not on a CUDA device.
            TypeError: an argument that is no ordinary tensor, number or name: a replay would not see it change inside.
            ValueError: training mode; arguments that share memory, where the network writes to them; a rule that draws
                members or fresh dropout masks, which a replay would repeat: such calls need no capture, since the
                launches of a plan replay as a graph by themselves.
        """
        if not device_of(self.device).launches:
            raise RuntimeError(f"capture: the ensemble is on {self.device}, expected a CUDA device; call it as it is")
        self._record(args, kwargs)

    def _record(self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.training:
            raise ValueError("capture: the ensemble is in training mode, expected evaluation; call .eval() first")
        why = self._why_not_recorded()
        if why is not None:
            raise ValueError(f"capture: {why}")
        arguments = Arguments(args, kwargs)
        if not arguments.plain():
            raise TypeError(
                f"capture: arguments are {arguments.described()}, expected ordinary tensors, numbers, names and "
                "dtypes, as a replay sees nothing else change; pass what such an object holds, or do not capture"
            )
        with torch.inference_mode(False), torch.no_grad():  # later calls write to what a recording keeps
            self._evaluated(args, kwargs)  # checks fold against loop, which no recording can
            if self._shared(arguments):
                raise ValueError("capture: the network writes to its arguments, and they share memory; pass copies")
            step = RecordedStep(
                self._evaluated,
                args,
                kwargs,
                self,
            )
        self._recorded[self._signature(arguments)] = step

    def _why_not_recorded(self: Any) -> str | None:
        """Return what a replay would wrongly repeat, such as random draws; None where there is no such thing."""
        if self._draws.assignment() is not None:
            return "members are assigned to the rows of these calls alone; leave ens.assigned"
        if self._fresh:
            return "{} at every call; {}".format(*self._engine.kind.drawn_anew)
        return f"rule {self.rule.name!r} draws members, so each call runs other rows" if self.rule.random else None

    def _signature(self: Any, arguments: Arguments) -> Any:
        return arguments.plan_key(), self._shared(arguments), self.rule, settings(self.device.type)

    def _shared(self: Any, arguments: Arguments) -> bool:
        """Whether what the network writes to one argument changes another, which those of a recording do not show."""
        return self._engine.behaviour.writes_arguments and arguments.share_memory()

    if TYPE_CHECKING:
        _draws: Any

        def _evaluated(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate all members and aggregate; the member's own signature and return type."""
        outside = torch.compiler.is_compiling() and reproducible.enabled()  # a compiler chooses by the batch
        if outside or (torch.compiler.is_dynamo_compiling() and self._draws.any_assigned):
            return drawn_pass(self._evaluated, args, kwargs)
        step = self._recorded_step(args, kwargs)
        return self._evaluated(args, kwargs) if step is None else step(args, kwargs)

    def _with_captured(self, calls: list[CallReport]) -> list[CallReport]:
        """States of signatures, with those that were captured, and why one is not replayed any more."""
        changed = "weights or state have changed since, so such calls are evaluated as others are; capture them again"
        steps = list(self.__dict__["_recorded"].values())
        captured = {s.call: CallReport(s.call, "captured", "" if s.is_current(self) else changed) for s in steps}
        return [*(call for call in calls if call.call not in captured), *captured.values()]

    def _recorded_step(self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RecordedStep | None:
        """The recording that fits a call, or none."""
        recorded = self.__dict__["_recorded"]
        if recorded and self._draws.assignment() is not None:
            return None
        if not recorded or self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        if not may_replay(self.device.type):
            return None  # a graph that is being recorded, such as a sampler's, holds the evaluation and no replay
        arguments = Arguments(args, kwargs)
        step = recorded.get(self._signature(arguments)) if arguments.plain() else None
        return step if step is None or step.is_current(self) else None

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move or convert the weights, and forget the recordings that read them where they were."""
        self.__dict__["_recorded"].clear()
        return super()._apply(fn, recurse)
