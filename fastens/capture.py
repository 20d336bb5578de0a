"""Recorded steps: the evaluation of an ensemble as one CUDA graph per signature, with eager code where none fits."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fastens.kernels._graph import record_graph


class Weights:
    """The tensors that a recording reads at their addresses, kept alive, and how often each was changed."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = list(tensors)
        self._versions = self._count()
        self._places = [t.data_ptr() for t in self._tensors]

    def _count(self) -> int:
        return sum([0 if t.is_inference() else t._version for t in self._tensors])

    def are_current(self) -> bool:
        """Whether they are what they were, as far as torch counts changes."""
        return self._count() == self._versions

    def are(self, tensors: Iterable[Tensor]) -> bool:
        """Whether these are they, where they were and unchanged."""
        found = list(tensors)
        same = len(found) == len(self._tensors) and all(a is b for a, b in zip(found, self._tensors, strict=True))
        return same and self.are_current() and [t.data_ptr() for t in found] == self._places


class RecordedStep:
    """One recording: inputs that it reads, outputs that it writes, and the weights that it keeps alive.

    Args:
        run: called with positional and keyword arguments, evaluates the ensemble.
        args: the example's positional arguments.
        kwargs: its keyword arguments.
        device: of the ensemble.
        weights: the tensors that the recording reads at their addresses.
    """

    def __init__(
        self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device, weights: Any
    ) -> None:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        # CPU tensors, such as a scheduler's timesteps, become device memory: a graph cannot read them anew.
        self.inputs = [x.to(device, copy=True) if isinstance(x, Tensor) else x for x in leaves]
        static_args, static_kwargs = pytree.tree_unflatten(self.inputs, spec)
        self.weights = Weights(weights)
        self.replay, self.output = record_graph(lambda: run(static_args, static_kwargs), device)
        self.device = device
        self.done = torch.cuda.Event() if device.type == "cuda" else None

    def is_current(self) -> bool:
        """Whether the weights are those that were recorded, as far as torch counts changes."""
        return self.weights.are_current()

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Copy the arguments in, replay, and return copies: no later call writes to what was returned."""
        if self.done is not None:  # another stream may still read what this call overwrites
            torch.cuda.current_stream(self.device).wait_event(self.done)
        for static, given in zip(self.inputs, pytree.tree_leaves((args, kwargs)), strict=True):
            if isinstance(static, Tensor):
                static.copy_(given, non_blocking=True)
        self.replay()
        result = pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, self.output)
        if self.done is not None:
            self.done.record(torch.cuda.current_stream(self.device))
        return result


class Capturing(nn.Module):
    """An ensemble's recordings: where a call matches one it is replayed, else it is evaluated as ever."""

    def capture(self, *args: Any, **kwargs: Any) -> None:
        """Record the evaluation of these arguments as a CUDA graph; calls of the same signature replay it from then on.

        The signature is the shapes and dtypes of tensors, the values of everything else, the rule, autocast, and the
        precision of float32 products. A recording is replayed in evaluation mode under ``torch.no_grad`` only, and what
        it returns is the caller's. After an in-place change of the weights it is not replayed any more, since it may
        hold what was derived from them: capture again. After a change that torch does not count, :meth:`refresh`
        forgets it.

        Raises:
            RuntimeError: the ensemble is not on a CUDA device.
            ValueError: training mode, a rule that draws members or fresh dropout masks, which a replay would repeat:
                such calls need no capture, since the launches of a plan replay as a graph by themselves.
        """
        ensemble: Any = self
        if ensemble.device.type != "cuda":
            raise RuntimeError(
                f"capture: the ensemble is on {ensemble.device}, expected a CUDA device; call it as it is"
            )
        self._record(args, kwargs)

    def _record(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ensemble: Any = self
        if ensemble.training:
            raise ValueError("capture: the ensemble is in training mode, expected evaluation; call .eval() first")
        why = self._why_not_recorded()
        if why is not None:
            raise ValueError(f"capture: {why}")
        with torch.inference_mode(False), torch.no_grad():  # later calls write to what a recording keeps
            ensemble._evaluated(args, kwargs)  # checks fold against loop, which no recording can
            step = RecordedStep(
                ensemble._evaluated,
                args,
                kwargs,
                ensemble.device,
                [*ensemble.parameters(), *ensemble.buffers()],
            )
        ensemble._recorded[self._signature(args, kwargs)] = step

    def _why_not_recorded(self) -> str | None:
        """What changes from call to call that a replay would repeat, or none."""
        ensemble: Any = self
        return (
            f"rule {ensemble.rule.name!r} draws members, so each call runs other rows" if ensemble.rule.random else None
        )

    def _signature(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ensemble: Any = self
        leaves, spec = pytree.tree_flatten((args, kwargs))
        of_leaves = [(tuple(x.shape), x.dtype) if isinstance(x, Tensor) else (type(x), x) for x in leaves]
        kind = ensemble.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        precision = torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision
        return tuple(of_leaves), str(spec), ensemble.rule, autocast, precision

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate all members and aggregate; the member's own signature and return type."""
        step = self._recorded_step(args, kwargs)
        return self._evaluated(args, kwargs) if step is None else step(args, kwargs)

    def _recorded_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RecordedStep | None:
        """The recording that fits a call, or none."""
        recorded = self.__dict__["_recorded"]
        if not recorded or self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return None  # a graph that is being recorded, such as a sampler's, holds the evaluation and no replay
        try:
            step = recorded.get(self._signature(args, kwargs))
        except TypeError:  # an argument that does not hash has no recording
            return None
        return step if step is None or step.is_current() else None

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move or convert the weights, and forget the recordings that read them where they were."""
        self.__dict__["_recorded"].clear()
        return super()._apply(fn, recurse)
