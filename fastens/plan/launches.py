"""A plan for a GPU: the steps of a folded pass as a flat list of calls on tensors that were laid out beforehand.

The recording, and what is fused into what, are those of :mod:`fastens.plan.plan`. A group norm becomes moments that the
convolution before it takes of its own result, and scale, shift and activation that the convolution behind it applies as
it reads: a residual block is two convolutions, with one kernel for the moments of joined images.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastens.plan import attention, elementwise, layers
from fastens.plan import calls as run
from fastens.plan.emit import Call
from fastens.plan.lower import constants_of
from fastens.plan.memory import At, Buffer, Kept, KeptTensors, address_unit, lay_out
from fastens.plan.plan import lower_all
from fastens.plan.record import NotLowerable, Recording, Ref, mapped
from fastens.plan.typed import Normalised, TypedEmitter
from fastens.program import steps
from fastens.program.steps import NONE, Activation, Image, Opcode, Slot, Strided
from fastens.reference.group_moments import counts

_LOWERINGS = (attention, elementwise, layers)  # imported for the handlers that they register
_NO_MASK = steps.Mask()
_ACTIVATIONS = {int(a): a.name.lower() for a in Activation}


@dataclasses.dataclass(frozen=True)
class View:
    """Elements of a buffer, an input, an output or a constant: offset and strides in elements."""

    where: Any
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclasses.dataclass
class Launch:
    """A call: ``args`` and ``kwargs`` hold a :class:`View` where a tensor will be."""

    name: str
    function: Callable[..., None]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class _Statistics:
    """A group norm whose moments are known: the image that it normalises, its moments, and its step."""

    image: View
    moments: View
    step: steps.Norm


class Launches:
    """The launches of the steps of an emitter, in order."""

    def __init__(self, emitter: TypedEmitter, backend: str) -> None:
        self.emitter = emitter
        self.backend = backend
        self.inputs = emitter.recording.inputs
        self.list: list[Launch] = []
        self._norms: dict[Any, _Statistics] = {}
        self._convolutions: dict[View, Launch] = {}  # by what they write
        self._joined: dict[Any, View] = {}
        lowered: dict[type, Callable[[Any], None]] = {
            steps.Conv: self._conv,
            steps.Norm: self._norm,
            steps.Pointwise: self._pointwise,
            steps.LayerNorm: self._layer_norm,
            steps.Attention: self._attention,
            Normalised: self._normalised,
            Call: self._call,
        }
        for step in emitter.steps:
            if type(step) not in lowered:
                raise NotLowerable(f"a step of the kind {type(step).__name__.lower()} in launches")
            members = getattr(step, "members", NONE)
            if members != NONE:
                raise NotLowerable("rows that are dealt out anew in every call, in launches")
            if any(getattr(step, name, _NO_MASK) != _NO_MASK for name in ("mask_in", "mask_out")):
                raise NotLowerable("dropout masks in launches")
            lowered[type(step)](step)

    # Places

    def view(self, at: At, size: tuple[int, ...], stride: tuple[int, ...]) -> View:
        """Elements at a place."""
        if isinstance(at.where, int) and at.where - Slot.ARGUMENTS < len(self.inputs):
            unit = self.inputs[at.where - Slot.ARGUMENTS].dtype.itemsize
        elif isinstance(at.where, Buffer):
            unit = address_unit(at.where.dtype)
        else:
            unit = 4
        return View(at.where, at.num_bytes // unit, size, stride)

    def _image(self, image: Image, height: int, width: int) -> View:
        """[R, C, H, W]."""
        size = (image.rows, image.channels, height, width)
        return self.view(image.at, size, (image.row, 1, image.y, image.x))  # pyright: ignore[reportArgumentType]

    def _fresh(self, size: tuple[int, int, int, int], dtype: torch.dtype) -> View:
        """A buffer of its own for an image [R, C, H, W] with its channels last."""
        _, channels, height, width = size
        stride = (channels * height * width, 1, channels * width, channels)
        return View(self.emitter.buffer(math.prod(size), dtype), 0, size, stride)

    def _dtype(self, view: View) -> torch.dtype:
        if isinstance(view.where, Buffer):
            return view.where.dtype
        if isinstance(view.where, Kept):
            return view.where.tensor.dtype
        return self.inputs[view.where - Slot.ARGUMENTS].dtype

    def _source(self, sources: tuple[Image, Image], up: int, height: int, width: int) -> View:
        """What a step reads as one image: enlarged or joined first where it is not."""
        images = [self._image(s, height // up, width // up) for s in sources if s.channels]
        if len(images) == 1 and up == 1:
            return images[0]
        key = (*images, up)
        if key not in self._joined:
            channels = sum(image.size[1] for image in images)
            whole = self._fresh((images[0].size[0], channels, height, width), self._dtype(images[0]))
            self.add("join", run.join, whole, images, up)
            self._joined[key] = whole
        return self._joined[key]

    def _rows(self, at: Any, stride: int, rows: int, channels: int) -> View | None:
        """[R, C] of a place, none where there is none."""
        return None if at == NONE else self.view(at, (rows, channels), (stride, 1))

    @staticmethod
    def _stack(at: Any, channels: int) -> Tensor | None:
        """[K, C] of a constant, without what it was filled up with."""
        return None if at == NONE else at.where.tensor.flatten(1)[:, :channels].contiguous()

    def add(self, name: str, function: Callable[..., None], *args: Any, **kwargs: Any) -> Launch:
        """Append a launch."""
        launch = Launch(name, function, args, kwargs)
        self.list.append(launch)
        return launch

    # Steps

    def _norm(self, step: steps.Norm) -> None:
        image = self._source(step.sources, 1, step.height, step.width)
        spans = len(counts(step.height * step.width))
        size, stride = (step.rows, step.groups, spans, 2), (step.groups * spans * 2, spans * 2, 2, 1)
        moments = View(self.emitter.buffer(math.prod(size)), 0, size, stride)
        before = self._convolutions.get(image)
        if before is not None and "found" not in before.kwargs:
            before.kwargs |= {"found": moments, "num_groups": step.groups}
        else:
            self.add("moments", run.moments, moments, image, step.groups, self.backend)
        self._norms[step.out_scale.where] = _Statistics(image, moments, step)  # pyright: ignore[reportAttributeAccessIssue]

    def _settings(self, found: _Statistics) -> dict[str, Any]:
        """The norm as a convolution applies it."""
        step, channels = found.step, found.image.size[1]
        return {
            "moments": found.moments,
            "norm_weight": self._stack(step.weight, channels),
            "norm_bias": self._stack(step.bias, channels),
            "eps": step.eps,
            "scale": self._rows(step.row_scale, step.row_scale_row, step.rows, channels),
            "shift": self._rows(step.row_shift, step.row_shift_row, step.rows, channels),
        }

    def _normed(self, scale: Any, sources: tuple[Image, Image], up: int, height: int, width: int) -> tuple[Any, Any]:
        """The image that is normalised, and the norm; a norm of what is enlarged is computed before."""
        found = self._norms[scale.where]
        if up == 1:
            return self._source(sources, 1, height, width), self._settings(found)
        rows, channels = found.image.size[:2]
        small = self._fresh((rows, channels, height // up, width // up), self._dtype(found.image))
        image = self._source(sources, 1, height // up, width // up)
        self.add("group norm", run.group_norm, small, image, self._settings(found), "none", self.backend)
        large = self._fresh((rows, channels, height, width), self._dtype(small))
        self.add("join", run.join, large, [small], up)
        return large, {}

    def _normalised(self, step: Normalised) -> None:
        out = self._image(step.out, step.height, step.width)
        image, norm = self._normed(step.table_scale, step.sources, step.up, step.height, step.width)
        self.add("group norm", run.group_norm, out, image, norm, _ACTIVATIONS[step.act_in], self.backend)

    def _conv(self, step: steps.Conv) -> None:
        out = self._image(step.out, step.out_h, step.out_w)
        norm: dict[str, Any] = {}
        if step.table_scale != NONE:
            x, norm = self._normed(step.table_scale, step.sources, step.up, step.in_h, step.in_w)
        else:
            x = self._source(step.sources, step.up, step.in_h, step.in_w)
        weight: Tensor = step.weight.where.tensor  # pyright: ignore[reportAttributeAccessIssue]
        bias = self._stack(step.bias, step.out_channels)
        row_bias = self._rows(step.row_vector, step.row_vector_row, step.rows, step.out_channels)
        residual = self._image(step.residual, step.out_h, step.out_w) if step.residual.channels else None
        if x.size[0] != step.rows or (residual is not None and residual.size[0] != step.rows):
            raise NotLowerable("rows that share an image, in launches")
        plain = not norm and row_bias is None and residual is None and step.scale == 1 and step.act_in == 0
        if plain and weight.shape[3:].numel() == 1 and (step.stride_h, step.stride_w) == (1, 1) and x.size == (
            step.rows, step.sources[0].channels, step.out_h, step.out_w
        ):  # fmt: skip
            self.add("linear", run.linear, out, x, weight, bias, _ACTIVATIONS[step.act_out], self.backend)
            return
        self._convolutions[out] = self.add(
            "conv2d", run.conv2d, out, x, weight, bias, (step.stride_h, step.stride_w), (step.pad_top, step.pad_left),
            backend=self.backend, **norm, activation=_ACTIVATIONS[step.act_in], row_bias=row_bias, residual=residual,
            output_scale=step.scale, output_activation=_ACTIVATIONS[step.act_out],
        )  # fmt: skip

    def _operand(self, operand: Strided, sizes: list[int]) -> View:
        kept = [(n, stride) for n, stride in zip(sizes, operand.strides, strict=True) if n > 1] or [(1, 1)]
        size, stride = zip(*kept, strict=True)  # without strides of 0 that mean nothing: libraries believe them
        return self.view(operand.at, size, stride)  # pyright: ignore[reportArgumentType]

    def _pointwise(self, step: steps.Pointwise) -> None:
        code = []
        for i in range(step.num_instructions):
            word, number = step.instructions[2 * i : 2 * i + 2]
            word = int(word)
            code.append((Opcode(word & 0xFFFF), word >> 16 & 0xFFFF, word >> 32, float(number)))
        inputs = [self._operand(x, step.sizes) for x in step.inputs[: step.num_inputs]]
        self.add("pointwise", run.pointwise, self._operand(step.out, step.sizes), inputs, code)
        written = step.out.at.where  # pyright: ignore[reportAttributeAccessIssue]
        self._convolutions = {view: launch for view, launch in self._convolutions.items() if view.where is not written}
        self._joined = {
            key: view for key, view in self._joined.items() if all(v.where is not written for v in key[:-1])
        }

    def _layer_norm(self, step: steps.LayerNorm) -> None:
        size = (step.rows, step.tokens, step.channels)
        x = self.view(step.source, size, (step.source_row, step.source_token, 1))  # pyright: ignore[reportArgumentType]
        out = self.view(step.out, size, (step.out_row, step.out_token, 1))  # pyright: ignore[reportArgumentType]
        weight, bias = (self._stack(at, step.channels) for at in (step.weight, step.bias))
        self.add("layer norm", run.layer_norm, out, x, weight, bias, step.eps, self.backend)

    def _attention(self, step: steps.Attention) -> None:
        def heads(of: steps.Heads, tokens: int, width: int) -> View:
            size = (step.rows, step.heads, tokens, width)
            return self.view(of.at, size, (of.row, of.head, of.token, of.channel))  # pyright: ignore[reportArgumentType]

        self.add(
            "attention", run.attention, heads(step.out, step.queries, step.value_width),
            heads(step.q, step.queries, step.width), heads(step.k, step.keys, step.width),
            heads(step.v, step.keys, step.value_width), step.scale,
        )  # fmt: skip

    def _call(self, step: Call) -> None:
        def seen(ref: Ref) -> View:
            found = self.view(step.places[ref], ref.size, ref.stride)
            if self._dtype(found) != ref.dtype:
                raise NotLowerable(f"{step.func} of a value that is held in another dtype")
            return found

        args, kwargs = constants_of(self.emitter, (step.args, step.kwargs))
        args, kwargs = mapped(Ref, seen, (args, kwargs))
        self.add(str(step.func), run.call, [seen(out) for out in step.outs], step.func, args, kwargs)


@dataclasses.dataclass
class _Bound:
    """Launches with the tensors that they read and write."""

    inputs: list[Tensor]
    outputs: list[Tensor]
    launches: list[tuple[Callable[..., None], Any, Any]]

    def run(self, given: list[Tensor], last: int | None, weights: list[float] | None) -> list[Tensor]:
        """Run all launches; with weights, launch ``last`` sums over the members, and nothing copies its result."""
        for static, x in zip(self.inputs, given, strict=True):
            static.copy_(x, non_blocking=True)
        if last is None or weights is None:
            for function, args, kwargs in self.launches:
                function(*args, **kwargs)
            return [x.clone() for x in self.outputs]
        for function, args, kwargs in (*self.launches[:last], *self.launches[last + 1 : -1]):
            function(*args, **kwargs)
        _, args, kwargs = self.launches[last]
        return [run.conv2d_sum(weights, *args[1:], **kwargs)]


class LaunchPlan:
    """The launches of a folded pass, and their memory.

    Args:
        recording: of the pass.
        num_members: K.
        constants: the ensemble's stacks and what is derived from them.
        device: where it runs.
        backend: the code that runs it: ``"auto"``, ``"triton"`` or ``"reference"``.
    """

    def __init__(
        self, recording: Recording, num_members: int, constants: KeptTensors, device: torch.device, backend: str
    ) -> None:
        emitter = TypedEmitter(recording, num_members, 1, constants)  # pyright: ignore[reportArgumentType]
        self._outputs = [(ref.size, ref.dtype) for ref in lower_all(emitter)]
        self._inputs = list(recording.inputs)
        self._device = device
        self._launches = Launches(emitter, backend).list
        self._last = self._summable()
        self.sums = self._last is not None
        for i, launch in enumerate(self._launches):
            mapped(View, lambda v, i=i: v.where.touch(i) if isinstance(v.where, Buffer) else None,
                   (launch.args, launch.kwargs))  # fmt: skip
        self.num_bytes = max(64, lay_out(emitter.buffers))
        self._lock = threading.Lock()
        self._bound = self._bind()
        self._done = torch.cuda.Event() if device.type == "cuda" else None

    @property
    def kinds(self) -> dict[str, int]:
        """How many launches of each kind, and calls of torch by name."""
        return Counter(launch.name for launch in self._launches)

    def _summable(self) -> int | None:
        """The number of the convolution that the only output is a copy of, where it may sum over the members."""
        *before, copy = self._launches
        if len(self._outputs) != 1 or copy.function is not run.pointwise:
            return None
        _, (source, *others), code = copy.args
        writers = [i for i, x in enumerate(before) if x.function is run.conv2d and x.args[0].where is source.where]
        if others or len(code) != 1 or code[0][0] is not Opcode.COPY or len(writers) != 1:
            return None
        read: list[View] = []
        mapped(View, read.append, [(x.args[1:], x.kwargs) for x in before])
        (out, x, weight, _, stride, padding), settings = before[writers[0]].args, before[writers[0]].kwargs
        whole = math.prod(source.size) == math.prod(out.size) == math.prod(self._outputs[0][0])
        space = zip(x.size[2:], weight.shape[3:], stride, padding, strict=True)
        symmetric = tuple((n + 2 * p - taps) // s + 1 for n, taps, s, p in space) == tuple(out.size[2:])
        plain = settings["row_bias"] is settings["residual"] is None and settings["output_scale"] == 1
        plain = plain and settings["output_activation"] == "none" and "found" not in settings
        unread = all(view.where is not source.where for view in read)
        return writers[0] if whole and symmetric and plain and unread else None

    def _bind(self) -> _Bound:
        """The launches in memory of their own."""
        arena = torch.empty(self.num_bytes, dtype=torch.uint8, device=self._device)
        inputs = [
            torch.empty(ref.span, dtype=ref.dtype, device=self._device).as_strided(ref.size, ref.stride)
            for ref in self._inputs
        ]
        outputs = [torch.empty(size, dtype=dtype, device=self._device) for size, dtype in self._outputs]

        def tensor(view: View) -> Tensor:
            where = view.where
            if isinstance(where, Buffer):
                whole = arena.view(where.dtype)
                start = where.offset // where.dtype.itemsize
            elif isinstance(where, Kept):
                whole, start = where.tensor, 0
            else:
                number = where - Slot.ARGUMENTS
                whole, start = (inputs + outputs)[number], 0
            return whole.as_strided(view.size, view.stride, start + view.offset)

        return _Bound(
            inputs, outputs, [(x.function, *mapped(View, tensor, (x.args, x.kwargs))) for x in self._launches]
        )

    def run(self, inputs: list[Tensor], weights: list[float] | None = None) -> list[Tensor]:
        """Run the launches.

        While a CUDA graph is recorded they are bound to memory of that graph's own, so that its replays may run beside
        calls.

        Args:
            inputs: tensors of the shapes, strides and dtypes of the recording, on any device.
            weights: K numbers by which the members are summed, where the plan ``sums``; none for each member's output.

        Returns:
            The outputs of the pass, in memory of their own.
        """
        last = None if weights is None else self._last
        if self._done is not None and torch.cuda.is_current_stream_capturing():
            return self._bind().run(inputs, last, weights)
        with self._lock:
            if self._done is not None:  # another stream may still use the memory
                torch.cuda.current_stream(self._device).wait_event(self._done)
            outputs = self._bound.run(inputs, last, weights)
            if self._done is not None:
                self._done.record(torch.cuda.current_stream(self._device))
            return outputs
