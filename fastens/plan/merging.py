"""Fewer launches: what is before and behind a convolution becomes part of it, and layers with one input become one."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from typing import Any

import torch

from fastens.plan import calls as run
from fastens.plan.copies import fuse_elementwise, read_through_copies, tidy, write_in_place
from fastens.plan.dataflow import Dataflow
from fastens.plan.launch import Launch, View
from fastens.plan.memory import KeptTensors
from fastens.plan.moments import place_moments, skip_joins
from fastens.plan.record import Ref
from fastens.plan.views import joined
from fastens.program.steps import Opcode

_MOST_DRAWN = 64 * 2**20  # bytes of masks that are held at a time so that one launch draws them
_BEHIND = ("row_bias", "residual", "found")


def merge(flow: Dataflow, inputs: list[Ref], constants: KeptTensors) -> None:
    """Merge launches as far as possible.

    Args:
        flow: the launches, changed in place.
        inputs: of the pass.
        constants: keeps the weights of layers that become one.
    """
    read_through_copies(flow, inputs)
    add_residuals(flow)
    activate_once(flow)
    stack_layers(flow, constants)
    write_in_place(flow)
    fuse_elementwise(flow)
    skip_joins(flow)
    place_moments(flow)
    part_vectors(flow)
    name_linear_layers(flow)
    draw_together(flow)
    tidy(flow)
    flow.index()
    flow.remove_unread()


def _is_linear(launch: Launch) -> bool:
    """Whether a convolution reads each pixel by itself, and has nothing before it."""
    if launch.function is not run.conv2d:
        return False
    _, _, weight, _, stride, padding = launch.args
    settings = launch.kwargs
    alone = weight.shape[3:].numel() == 1 and tuple(stride) == (1, 1) and tuple(padding) == (0, 0)
    nothing = settings["moments"] is settings["mask"] is settings["skip"] is None
    return alone and nothing and settings["activation"] == "none" and not settings["shared"]


# What is behind a convolution


def add_residuals(flow: Dataflow) -> None:
    """Let convolutions add what an elementwise launch adds to their result, and multiply by its number."""
    for launch in list(flow.launches):
        if launch.function is run.pointwise:
            _added(flow, launch)


def _added(flow: Dataflow, launch: Launch) -> None:
    out, inputs, code = launch.args
    added = code[0][0] is Opcode.ADD and len(inputs) == 2 and {code[0][1], code[0][2]} == {0, 1}
    rest = code[1:] if added else code
    if (len(inputs) != 1 and not added) or len(rest) > 1 or not all(c[0] is Opcode.MULTIPLY_NUMBER for c in rest):
        return
    factor = rest[0][3] if rest else 1.0
    for i in range(len(inputs)):
        before = flow.writer(inputs[i])
        if before is None or before.function is not run.conv2d or len(flow.readers(inputs[i])) != 1:
            continue
        settings, result = before.kwargs, before.args[0]
        free = settings["output_activation"] == "none" and "found" not in settings and flow.is_settled(before)
        if added:
            free = free and settings["residual"] is None
        free = free and settings["output_scale"] == 1  # two numbers as their product would round once, not twice
        if not free or not _covers(inputs[i], result) or flow.writer(out) is None:
            continue
        if any(flow.dtype(view) != flow.dtype(result) for view in (out, *inputs)):
            continue
        new = result.through(inputs[i], out)
        residual = result.through(inputs[i], inputs[1 - i]) if added else None
        if new is None or not new.is_dense() or (added and (residual is None or not residual.is_dense())):
            continue
        before.args = (new, *before.args[1:])
        settings["output_scale"] = factor
        settings["residual"] = residual if added else settings["residual"]
        flow.launches.remove(before)
        flow.swap(launch, before)
        return


def _covers(read: View, written: View) -> bool:
    """Whether one view is all elements of the other, each once."""
    return math.prod(read.size) == math.prod(written.size) and _extent(read) == _extent(written)


def _extent(view: View) -> tuple[int, Any]:
    return view.offset, joined(sorted(((n, s) for n, s in zip(view.size, view.stride, strict=True) if n > 1),
                                      key=lambda pair: pair[1]))  # fmt: skip


def activate_once(flow: Dataflow) -> None:
    """Apply an activation where a vector is made, where all linear layers that read it apply it."""
    for launch in flow.launches:
        if (
            launch.function is not run.conv2d
            or launch.kwargs["output_activation"] != "none"
            or "found" in launch.kwargs
        ):
            continue
        out = launch.args[0]
        readers = flow.readers(out)
        kinds = {_before(reader, out) for reader in readers}
        if (
            flow.writer(out) is launch
            and len(readers) > 1
            and len(kinds) == 1
            and kinds <= {"silu", "gelu", "gelu_tanh"}
        ):
            launch.kwargs["output_activation"] = kinds.pop()
            for reader in readers:
                reader.kwargs["activation"] = "none"


def _before(launch: Launch, view: View) -> str:
    """The activation that a convolution applies to a view, and nothing where it does more, or reads it otherwise."""
    if launch.function is not run.conv2d or not launch.args[1].same_image(view) or launch.kwargs["moments"] is not None:
        return ""
    return launch.kwargs["activation"] if [v.where for v in launch.reads()].count(view.where) == 1 else ""


# Layers that read the same


def stack_layers(flow: Dataflow, constants: KeptTensors) -> None:
    """One convolution for several of the same normalised image, whose results lie side by side."""
    groups: dict[Any, list[Launch]] = defaultdict(list)
    for launch in flow.launches:
        if launch.function is not run.conv2d or _is_linear(launch) or any(launch.kwargs.get(n) for n in _BEHIND):
            continue
        _, x, weight, bias, *rest = launch.args
        same = {name: _identity(value) for name, value in launch.kwargs.items()}
        key = (x, tuple(weight.shape[3:]), weight.dtype, bias is None, *map(tuple, rest), *sorted(same.items()))
        groups[key].append(launch)
    for group in groups.values():
        if len(group) > 1:
            _stacked(flow, group, constants)


def _identity(value: Any) -> Any:
    return (value.data_ptr(), tuple(value.shape)) if isinstance(value, torch.Tensor) else str(value)


def _stacked(flow: Dataflow, group: list[Launch], constants: KeptTensors) -> None:
    outs = [launch.args[0] for launch in group]
    total = sum(out.size[1] for out in outs)
    rows, _, height, width = outs[0].size
    moved: list[tuple[Launch, View, View]] = []
    whole = flow.new_buffer(rows * total * height * width, flow.dtype(outs[0]))
    start = 0
    for launch, out in zip(group, outs, strict=True):
        if flow.writer(out) is not launch or not out.is_dense():
            return
        part = View(whole, start, out.size, (height * width * total, 1, width * total, total))
        for reader in flow.readers(out):
            for view in reader.reads():
                new = view.through(out, part) if view.where is out.where else view
                fits = reader.function is run.attention or (reader.function is run.pointwise)
                if new is None or not fits:
                    return
                if view.where is out.where:
                    moved.append((reader, view, new))
        start += out.size[1]
    first = group[0]
    weights, biases = [launch.args[2] for launch in group], [launch.args[3] for launch in group]
    weight, bias = constants.joined(weights), None if biases[0] is None else constants.joined(biases)
    out = View(whole, 0, (rows, total, height, width), (height * width * total, 1, width * total, total))
    for reader, old, new in moved:
        reader.replace(old, new)
    for launch in group[1:]:
        flow.launches.remove(launch)
    first.args = (out, first.args[1], weight, bias, *first.args[4:])
    flow.index()


def part_vectors(flow: Dataflow) -> None:
    """Let a layer whose results are read in parts, as scale and shift are, be several, each with memory of its own."""
    for launch in list(flow.launches):
        plain = _is_linear(launch) and not any(launch.kwargs.get(name) for name in _BEHIND)
        out: View = launch.args[0]
        if (
            not plain
            or launch.kwargs["offsets"] is not None
            or flow.writer(out) is not launch
            or not out.is_dense()
            or out.size[2:] != (1, 1)
        ):
            continue
        reads = [(reader, view) for reader in flow.readers(out) for view in reader.reads() if view.where is out.where]
        parts = sorted({(view.offset, view.size[-1]) for _, view in reads})
        rows, channels = out.size[:2]
        vectors = all((v.size[0], *v.stride) == (rows, channels, 1) and len(v.size) == 2 for _, v in reads)
        apart = all(start + size <= other for (start, size), (other, _) in itertools.pairwise(parts))
        if len(parts) < 2 or not vectors or not apart or flow.outputs in flow.readers(out):
            continue
        weight, bias = launch.args[2:4]
        made: dict[tuple[int, int], View] = {}
        at = flow.position(launch)
        flow.launches.pop(at)
        for start, size in parts:
            new = View(flow.new_buffer(rows * size, flow.dtype(out)), 0, (rows, size, 1, 1), (size, 1, size, size))
            stacks = weight[:, start : start + size], None if bias is None else bias[:, start : start + size]
            flow.launches.insert(
                at, Launch(launch.name, launch.function, (new, launch.args[1], *stacks, *launch.args[4:]),
                           dict(launch.kwargs)),
            )  # fmt: skip
            made[start, size] = View(new.where, 0, (rows, size), (size, 1))
        for reader, view in reads:
            reader.replace(view, made[view.offset, view.size[1]])
        flow.index()


def name_linear_layers(flow: Dataflow) -> None:
    """Let linear layers that read the same vectors run in one launch, and others in that of linear layers."""
    groups: dict[Any, list[Launch]] = defaultdict(list)
    for launch in flow.launches:
        plain = _is_linear(launch) and not any(launch.kwargs.get(name) for name in _BEHIND)
        if plain and launch.kwargs["output_scale"] == 1 and flow.writer(launch.args[0]) is launch:
            out, x = launch.args[:2]
            offsets = launch.kwargs["offsets"]
            alone = None if offsets is None else out
            groups[x, launch.kwargs["output_activation"], out.size[2:], alone].append(launch)
    for (x, activation, _, _), group in groups.items():
        first, backend = group[0], group[0].kwargs["backend"]
        outs, weights, biases = ([launch.args[i] for launch in group] for i in (0, 2, 3))
        if len(group) == 1:
            new = Launch(
                "linear", run.linear, (outs[0], x, weights[0], biases[0], activation, backend, first.kwargs["offsets"])
            )
        else:
            new = Launch("linear group", run.linear_group, (outs, x, weights, biases, activation, backend))
        for launch in group[1:]:
            flow.launches.remove(launch)
        flow.swap(first, new)


def draw_together(flow: Dataflow) -> None:
    """Let one launch draw the masks of all dropouts, which depend on inputs of the pass alone."""
    groups: dict[Any, list[Launch]] = defaultdict(list)
    for launch in flow.launches:
        if launch.function is run.draw:
            _, drawn, _, *rows, threshold, _, _, backend = launch.args
            groups[drawn, *rows, threshold, backend].append(launch)
    for group in groups.values():
        held = sum(bits.where.num_bytes for launch in group for bits in launch.args[0])
        if len(group) == 1 or held > _MOST_DRAWN:
            continue
        first, *others = group
        bits, keys, channels, steps = ([x for launch in group for x in launch.args[i]] for i in (0, 2, 7, 8))
        _, drawn, _, *rows, threshold, _, _, backend = first.args
        first.args = (bits, drawn, keys, *rows, threshold, channels, steps, backend)
        for launch in others:
            flow.launches.remove(launch)
        flow.index()
