"""Layers that read the same become one, and a layer that is read in parts becomes several."""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from typing import Any

import torch

from fastens.plan.gpu.dataflow import Dataflow
from fastens.plan.gpu.launch import Conv, Linear, LinearGroup
from fastens.plan.graph import Attention, Node, Pointwise, View
from fastens.program.block import ConvBlock


def _reads_pixels(block: ConvBlock[View]) -> bool:
    """Whether a convolution reads each pixel by itself, and has nothing before it."""
    alone = block.weight.shape[3:].numel() == 1 and tuple(block.stride) == (1, 1) and tuple(block.padding) == (0, 0)
    return alone and block.begins_plain and not block.shared


def _linear(node: Node) -> Conv | None:
    """A convolution that is a linear layer of the channels, but for factor and activation behind it; or none."""
    if not isinstance(node, Conv) or node.moments is not None or not _reads_pixels(node.block):
        return None
    return node if node.block.epilogue.row_bias is node.block.epilogue.residual is None else None


def stack_layers(flow: Dataflow) -> None:
    """conv(x; V) and conv(x; W), of one prologue  ->  conv(x; [V W]), whose results lie side by side."""
    groups: dict[Any, list[Conv]] = defaultdict(list)
    for node in flow.nodes:
        if not isinstance(node, Conv) or node.moments or _reads_pixels(node.block) or not flow.is_settled(node):
            continue
        block = node.block
        if block.epilogue.row_bias is block.epilogue.residual is None:
            own = block._replace(weight=None, bias=None)
            of_weights = (tuple(block.weight.shape[3:]), block.weight.dtype, block.bias is None)
            groups[of_weights, *map(_identity, own.flat())].append(node)
    for group in groups.values():
        if len(group) > 1:
            _stacked(flow, group)


def _identity(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.data_ptr(), tuple(value.shape)
    return value if isinstance(value, View) else str(value)


def _stacked(flow: Dataflow, group: list[Conv]) -> None:
    outs = [node.out for node in group]
    total = sum(out.size[1] for out in outs)
    rows, _, height, width = outs[0].size
    moved: list[tuple[Node, View, View]] = []
    whole = flow.new_buffer(rows * total * height * width, outs[0].dtype)
    start = 0
    for node, out in zip(group, outs, strict=True):
        if flow.writer(out) is not node or not out.is_dense():
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
    weight = flow.constants.joined([node.block.weight for node in group])
    biases = [node.block.bias for node in group if node.block.bias is not None]
    first.change(weight=weight, bias=flow.constants.joined(biases) if biases else None)
    first.out = View(whole, 0, (rows, total, height, width), (height * width * total, 1, width * total, total))
    for reader, old, new in moved:
        reader.replace(old, new)
    for node in group[1:]:
        flow.nodes.remove(node)
    flow.index()


def split_linear_layers(flow: Dataflow) -> None:
    """linear(x; [V W]), read in parts as scale and shift are  ->  linear(x; V) and linear(x; W), each dense."""
    for node in list(flow.nodes):
        conv = _linear(node)
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
        at = flow.position(node)
        flow.nodes.pop(at)
        for start, size in parts:
            new = View(flow.new_buffer(rows * size, out.dtype), 0, (rows, size, 1, 1), (size, 1, size, size))
            part = slice(start, start + size)
            block = conv.block.replace(weight=weight[:, part], bias=None if bias is None else bias[:, part])
            flow.nodes.insert(at, dataclasses.replace(conv, out=new, block=block))
            made[start, size] = View(new.where, 0, (rows, size), (size, 1))
        for reader, view in reads:
            reader.replace(view, made[view.offset, view.size[1]])
        flow.index()


def merge_linear_layers(flow: Dataflow) -> None:
    """Conv 1x1 without prologue  ->  linear; several of the same vectors  ->  one group of linear layers."""
    groups: dict[Any, list[Conv]] = defaultdict(list)
    for node in flow.nodes:
        conv = _linear(node)
        if conv is not None and conv.block.epilogue.output_scale == 1 and flow.writer(conv.out) is conv:
            block = conv.block
            alone = None if block.offsets is None and flow.is_settled(conv) else conv.out
            # a kernel reads the weights of all of them in one dtype
            kind = block.weight.dtype, conv.out.size[2:]
            groups[block.x, block.epilogue.output_activation, kind, alone].append(conv)
    for (x, activation, _, _), group in groups.items():
        first = group[0]
        if len(group) == 1:
            block = first.block
            new = Linear(first.out, x, block.weight, block.bias, activation, block.offsets)
        else:
            outs, blocks = [conv.out for conv in group], [conv.block for conv in group]
            weights, biases = [block.weight for block in blocks], [block.bias for block in blocks]
            new = LinearGroup(outs, x, weights, biases, activation)
        for node in group[1:]:
            flow.nodes.remove(node)
        flow.swap(first, new)
