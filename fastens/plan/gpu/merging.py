"""Fewer launches: what is before and behind a convolution becomes part of it, and layers with one input become one."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import defaultdict
from typing import Any

import torch

from fastens.plan.gpu.copies import fuse_elementwise, read_through_copies, tidy, write_in_place
from fastens.plan.gpu.dataflow import Dataflow
from fastens.plan.gpu.launch import Attention, Conv, Draw, Launch, Linear, LinearGroup, Pointwise, View
from fastens.plan.gpu.moments import place_moments, skip_joins
from fastens.plan.lowering.views import joined
from fastens.plan.memory import KeptTensors
from fastens.program.block import ConvBlock
from fastens.program.steps import Opcode
from fastens.trace.record import Ref

_MOST_DRAWN = 64 * 2**20  # bytes of masks that are held at a time so that one launch draws them


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


def _reads_pixels(block: ConvBlock[View]) -> bool:
    """Whether a convolution reads each pixel by itself, and has nothing before it."""
    alone = block.weight.shape[3:].numel() == 1 and tuple(block.stride) == (1, 1) and tuple(block.padding) == (0, 0)
    return alone and block.begins_plain and not block.shared


def _linear(launch: Launch) -> Conv | None:
    """A convolution that is a linear layer of the channels, but for factor and activation behind it; or none."""
    if not isinstance(launch, Conv) or launch.moments is not None or not _reads_pixels(launch.block):
        return None
    return launch if launch.block.epilogue.row_bias is launch.block.epilogue.residual is None else None


# What is behind a convolution


def add_residuals(flow: Dataflow) -> None:
    """Let convolutions add what an elementwise launch adds to their result, and multiply by its number."""
    for launch in list(flow.launches):
        if isinstance(launch, Pointwise):
            _added(flow, launch)


def _added(flow: Dataflow, launch: Pointwise) -> None:
    out, inputs, code = launch.out, launch.inputs, launch.code
    added = code[0][0] is Opcode.ADD and len(inputs) == 2 and {code[0][1], code[0][2]} == {0, 1}
    rest = code[1:] if added else code
    if (len(inputs) != 1 and not added) or len(rest) > 1 or not all(c[0] is Opcode.MULTIPLY_NUMBER for c in rest):
        return
    factor = rest[0][3] if rest else 1.0
    for i in range(len(inputs)):
        before = flow.writer(inputs[i])
        if not isinstance(before, Conv) or len(flow.readers(inputs[i])) != 1:
            continue
        behind, result = before.block.epilogue, before.out
        free = behind.output_activation == "none" and before.moments is None and flow.is_settled(before)
        free = free and not (added and behind.residual is not None)
        free = free and behind.output_scale == 1  # two numbers as their product would round once, not twice
        if not free or not _covers(inputs[i], result) or flow.writer(out) is None:
            continue
        if any(flow.dtype(view) != flow.dtype(result) for view in (out, *inputs)):
            continue
        new = result.through(inputs[i], out)
        residual = result.through(inputs[i], inputs[1 - i]) if added else None
        if new is None or not new.is_dense() or (added and (residual is None or not residual.is_dense())):
            continue
        before.out = new
        before.change(output_scale=factor, residual=residual if added else behind.residual)
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
        if not isinstance(launch, Conv) or launch.block.epilogue.output_activation != "none" or launch.moments:
            continue
        readers = flow.readers(launch.out)
        kinds = {_before(reader, launch.out) for reader in readers}
        if (
            flow.writer(launch.out) is launch
            and len(readers) > 1
            and len(kinds) == 1
            and kinds <= {"silu", "gelu", "gelu_tanh"}
        ):
            launch.change(output_activation=kinds.pop())
            for reader in readers:
                if isinstance(reader, Conv):  # they all are: nothing else has an activation before it
                    reader.change(activation="none")


def _before(launch: Launch, view: View) -> str:
    """The activation that a convolution applies to a view, and nothing where it does more, or reads it otherwise."""
    if not isinstance(launch, Conv) or not launch.block.x.same_image(view):
        return ""
    if launch.block.prologue.moments is not None:
        return ""
    once = [v.where for v in launch.reads()].count(view.where) == 1
    return launch.block.prologue.activation if once else ""


# Layers that read the same


def stack_layers(flow: Dataflow, constants: KeptTensors) -> None:
    """One convolution for several of the same normalised image, whose results lie side by side."""
    groups: dict[Any, list[Conv]] = defaultdict(list)
    for launch in flow.launches:
        if not isinstance(launch, Conv) or launch.moments or _reads_pixels(launch.block):
            continue
        block = launch.block
        if block.epilogue.row_bias is block.epilogue.residual is None:
            own = block._replace(weight=None, bias=None)
            of_weights = (tuple(block.weight.shape[3:]), block.weight.dtype, block.bias is None)
            groups[of_weights, *map(_identity, own.flat()), launch.backend].append(launch)
    for group in groups.values():
        if len(group) > 1:
            _stacked(flow, group, constants)


def _identity(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.data_ptr(), tuple(value.shape)
    return value if isinstance(value, View) else str(value)


def _stacked(flow: Dataflow, group: list[Conv], constants: KeptTensors) -> None:
    outs = [launch.out for launch in group]
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
                if new is None or not isinstance(reader, Attention | Pointwise):
                    return
                if view.where is out.where:
                    moved.append((reader, view, new))
        start += out.size[1]
    first = group[0]
    weight = constants.joined([launch.block.weight for launch in group])
    biases = [launch.block.bias for launch in group if launch.block.bias is not None]
    first.change(weight=weight, bias=constants.joined(biases) if biases else None)
    first.out = View(whole, 0, (rows, total, height, width), (height * width * total, 1, width * total, total))
    for reader, old, new in moved:
        reader.replace(old, new)
    for launch in group[1:]:
        flow.launches.remove(launch)
    flow.index()


def part_vectors(flow: Dataflow) -> None:
    """Let a layer whose results are read in parts, as scale and shift are, be several, each with memory of its own."""
    for launch in list(flow.launches):
        conv = _linear(launch)
        if conv is None or conv.block.offsets is not None:
            continue
        out = conv.out
        if flow.writer(out) is not conv or not out.is_dense() or out.size[2:] != (1, 1):
            continue
        reads = [(reader, view) for reader in flow.readers(out) for view in reader.reads() if view.where is out.where]
        parts = sorted({(view.offset, view.size[-1]) for _, view in reads})
        rows, channels = out.size[:2]
        vectors = all((v.size[0], *v.stride) == (rows, channels, 1) and len(v.size) == 2 for _, v in reads)
        apart = all(start + size <= other for (start, size), (other, _) in itertools.pairwise(parts))
        if len(parts) < 2 or not vectors or not apart or flow.outputs in flow.readers(out):
            continue
        weight, bias = conv.block.weight, conv.block.bias
        made: dict[tuple[int, int], View] = {}
        at = flow.position(launch)
        flow.launches.pop(at)
        for start, size in parts:
            new = View(flow.new_buffer(rows * size, flow.dtype(out)), 0, (rows, size, 1, 1), (size, 1, size, size))
            part = slice(start, start + size)
            block = conv.block.replace(weight=weight[:, part], bias=None if bias is None else bias[:, part])
            flow.launches.insert(at, dataclasses.replace(conv, out=new, block=block))
            made[start, size] = View(new.where, 0, (rows, size), (size, 1))
        for reader, view in reads:
            reader.replace(view, made[view.offset, view.size[1]])
        flow.index()


def name_linear_layers(flow: Dataflow) -> None:
    """Let linear layers that read the same vectors run in one launch, and others in that of linear layers."""
    groups: dict[Any, list[Conv]] = defaultdict(list)
    for launch in flow.launches:
        conv = _linear(launch)
        if conv is not None and conv.block.epilogue.output_scale == 1 and flow.writer(conv.out) is conv:
            block, alone = conv.block, None if conv.block.offsets is None else conv.out
            groups[block.x, block.epilogue.output_activation, conv.out.size[2:], alone].append(conv)
    for (x, activation, _, _), group in groups.items():
        first = group[0]
        if len(group) == 1:
            block = first.block
            new = Linear(first.out, x, block.weight, block.bias, activation, first.backend, block.offsets)
        else:
            outs, blocks = [conv.out for conv in group], [conv.block for conv in group]
            weights, biases = [block.weight for block in blocks], [block.bias for block in blocks]
            new = LinearGroup(outs, x, weights, biases, activation, first.backend)
        for launch in group[1:]:
            flow.launches.remove(launch)
        flow.swap(first, new)


def draw_together(flow: Dataflow) -> None:
    """Let one launch draw the masks of all dropouts, which depend on inputs of the pass alone."""
    groups: dict[Any, list[Draw]] = defaultdict(list)
    for launch in flow.launches:
        if isinstance(launch, Draw):
            rows = (launch.members, launch.samples, launch.rows_per_member)
            groups[launch.drawn, *rows, launch.threshold, launch.backend].append(launch)
    for group in groups.values():
        held = sum(bits.where.num_bytes for launch in group for bits in launch.bits)
        if len(group) == 1 or held > _MOST_DRAWN:
            continue
        first, *others = group
        for launch in others:
            first.bits, first.keys = first.bits + launch.bits, first.keys + launch.keys
            first.channels, first.steps = first.channels + launch.channels, first.steps + launch.steps
            flow.launches.remove(launch)
        flow.index()
