"""What is asked of a device: whether kernels are launched on it, how it is made, its streams, graphs and memory.

No other module names a kind of GPU. To serve another kind, add a subclass of :class:`Device` to ``_KINDS``, and answer
the functions of this module for it, which ask about whatever GPU there is.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

MULTIPROCESSORS = 132  # of an H100 or H200, where there is no GPU to ask

T = TypeVar("T")
Scope = contextlib.AbstractContextManager[Any]
_NOTHING: Scope = contextlib.nullcontext()


class Device:
    """A device on which no kernel is launched: what is computed on it is there when the call returns.

    Args:
        where: the device as torch names it.

    Attributes:
        launches: whether kernels are launched on it: they run later, in the order of their stream, and graphs of them
            are recorded.
        library: the compiled library that serves it, none where none does.
        autocast: the kind of device whose autocast changes what functions do on it.
    """

    launches: ClassVar[bool] = False
    library: ClassVar[str | None] = None
    autocast: ClassVar[str] = "cpu"

    def __init__(self, where: torch.device) -> None:
        self.where = where

    @property
    def name(self) -> str:
        """What measurements on it are kept under."""
        return self.where.type

    @property
    def multiprocessors(self) -> int:
        """How many programs run at the same time at least."""
        return MULTIPROCESSORS

    @property
    def capability(self) -> tuple[int, int] | None:
        """The compute capability, none where there is no GPU to ask."""
        return None

    @property
    def generation(self) -> int | None:
        """The first number of the compute capability, none where there is no GPU to ask."""
        return None if self.capability is None else self.capability[0]

    def current(self) -> Scope:
        """Within it this is the device that kernels are launched on."""
        return _NOTHING

    def capturing(self) -> bool:
        """Whether a graph is being recorded on the current stream."""
        return False

    def stream(self) -> int:
        """A number of the current stream, equal for no other."""
        return 0

    def settle(self) -> None:
        """Wait until what was launched on the current stream has ended."""

    def turns(self) -> Scope:
        """Return what each use of one memory enters: on whichever stream, it waits until the use before has ended."""
        return _NOTHING

    def record(self, warm_up: Callable[[], Any], run: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """Record what ``run`` launches as a graph.

        Args:
            warm_up: called before, on a stream beside the current one.
            run: called once; what it launches is recorded and does not run.

        Returns:
            What replays the graph, and what ``run`` returned, which a replay overwrites.
        """
        raise RuntimeError(f"graphs are recorded of kernels that are launched, and none are on {self.where}")

    def stopwatch(self) -> Callable[[Callable[[], Any]], float]:
        """Return what runs a function and tells for how many seconds the device was at it."""

        def seconds(run: Callable[[], Any]) -> float:
            started = time.perf_counter()
            run()
            return time.perf_counter() - started

        return seconds

    def free_memory(self) -> int:
        """Bytes for graphs: those that nobody holds, and those that torch holds for nobody."""
        return 0

    def generator(self) -> torch.Generator:
        """Torch's own generator of the current device of this kind, which draws where no other is given."""
        return torch.default_generator


class _Cpu(Device):
    library: ClassVar[str | None] = "cpu"


class _Cuda(Device):
    launches: ClassVar[bool] = True
    library: ClassVar[str | None] = "cuda"
    autocast: ClassVar[str] = "cuda"

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.where)

    @property
    def multiprocessors(self) -> int:
        return torch.cuda.get_device_properties(self.where).multi_processor_count

    @property
    def capability(self) -> tuple[int, int]:
        return torch.cuda.get_device_capability(self.where)

    def current(self) -> Scope:
        return torch.cuda.device(self.where)

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def stream(self) -> int:
        return torch.cuda.current_stream(self.where).cuda_stream

    def settle(self) -> None:
        torch.cuda.current_stream(self.where).synchronize()

    def turns(self) -> Scope:
        return _Turns(self.where)

    def record(self, warm_up: Callable[[], Any], run: Callable[[], T]) -> tuple[Callable[[], None], T]:
        beside = torch.cuda.Stream(self.where)
        beside.wait_stream(torch.cuda.current_stream(self.where))
        with self.current(), torch.cuda.stream(beside):
            warm_up()
        torch.cuda.current_stream(self.where).wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        # a stream of this device: the default one is of the device that recorded first; other threads may be at work
        with self.current(), torch.cuda.graph(graph, stream=beside, capture_error_mode="thread_local"):
            output = run()
        return graph.replay, output

    def stopwatch(self) -> Callable[[Callable[[], Any]], float]:
        with self.current():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def seconds(run: Callable[[], Any]) -> float:
            with self.current():
                start.record()
                run()
                end.record()
                end.synchronize()
            return start.elapsed_time(end) / 1e3

        return seconds

    def free_memory(self) -> int:
        held = torch.cuda.memory_reserved(self.where) - torch.cuda.memory_allocated(self.where)
        return torch.cuda.mem_get_info(self.where)[0] + held

    def generator(self) -> torch.Generator:
        return torch.cuda.default_generators[torch.cuda.current_device()]


class _Turns:
    """The end of the last use, on the stream that it ran on."""

    def __init__(self, where: torch.device) -> None:
        self._where = where
        self._ended = torch.cuda.Event()

    def __enter__(self) -> None:
        torch.cuda.current_stream(self._where).wait_event(self._ended)

    def __exit__(self, *_: object) -> None:
        self._ended.record(torch.cuda.current_stream(self._where))


_KINDS: dict[str, type[Device]] = {"cpu": _Cpu, "cuda": _Cuda}
_devices: dict[torch.device, Device] = {}
GPUS = tuple(kind for kind, made in _KINDS.items() if made.launches)  # as torch names their types


def device_of(where: Tensor | torch.device | str) -> Device:
    """The device of a tensor, or of this name; the same object for the same device."""
    if isinstance(where, str):
        where = torch.device(where)
    key = where if isinstance(where, torch.device) else where.device
    found = _devices.get(key)
    if found is None:
        found = _devices[key] = _KINDS.get(key.type, Device)(key)
    return found


def on_gpu(x: Tensor) -> bool:
    """Whether kernels are launched on the device of a tensor; of all questions the one that compilers trace."""
    return x.is_cuda


def gpu(number: int | None = None) -> Device | None:
    """The GPU that a program takes where none is named, none where torch sees none.

    Args:
        number: of a process on its machine; those beyond the number of GPUs share them.
    """
    if not torch.cuda.is_available():
        return None
    return device_of("cuda" if number is None else f"cuda:{number % torch.cuda.device_count()}")


def capturing() -> bool:
    """Whether a graph is being recorded on any device's current stream, in which nothing can be looked at."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def copy_given(into: Tensor, given: Tensor) -> None:
    """Copy what a caller gave, who may write to it as soon as this returns; while a graph is recorded, at each replay.

    Pinned memory is read when the copy's turn comes on the device, unless it is waited for; any other is staged before.

    Args:
        into: where dimensions of stride 0 repeat one element.
        given: of the same shape, which repeats its elements along those dimensions.
    """
    if 0 in into.stride():
        for d, (size, stride) in enumerate(zip(into.shape, into.stride(), strict=True)):
            if size > 1 and not stride:
                into, given = into.narrow(d, 0, 1), given.narrow(d, 0, 1)
    into.copy_(given, non_blocking=not (given.is_cpu and given.is_pinned()) or capturing())


def lacking(library: str) -> str | None:
    """Why this torch has not what a compiled library is linked with, or none."""
    return f"torch {torch.__version__} has no CUDA" if library == "cuda" and torch.version.cuda is None else None


def release_memory() -> None:
    """Give back what torch holds of GPUs' memory for nobody."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def random_states() -> list[Tensor]:
    """The states of torch's generators of all GPUs, none where none has been used."""
    return torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def set_random_states(states: list[Tensor]) -> None:
    """Let generators of GPUs draw again what they drew since these were their states."""
    if states:
        torch.cuda.set_rng_state_all(states)


def random_forked() -> Scope:
    """Within it torch draws, on the CPU and the current GPU, from copies of its generators."""
    return torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else [])


def convolution_precision() -> str:
    """The precision of float32 convolutions on GPUs: allow_tf32, the older name, raises where this one was set."""
    return torch.backends.cudnn.conv.fp32_precision  # pyright: ignore[reportAttributeAccessIssue]  # in no stub


def product_precision() -> str:
    """The precision of float32 products of matrices on GPUs."""
    return str(torch.backends.cuda.matmul.fp32_precision)
