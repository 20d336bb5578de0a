"""Lowering a whole recording: its inputs, every operation in turn, and its outputs."""

from __future__ import annotations

from collections import Counter

from fastens.plan.lowering import attention, dropout, elementwise, layers
from fastens.plan.lowering.builder import Emitter
from fastens.plan.lowering.registry import copy_out, lower
from fastens.plan.lowering.values import Leaf, Stored
from fastens.plan.memory import At
from fastens.program.steps import Slot
from fastens.trace.functionalize import contiguous, versioned
from fastens.trace.record import Ref

_HANDLERS = (attention, dropout, elementwise, layers)  # imported for the handlers that they register


def lower_all(emitter: Emitter) -> list[Ref]:
    """Lower a whole recording: inputs in their slots, every operation, and outputs, contiguous, in the slots behind.

    Returns:
        The outputs.
    """
    recording = emitter.recording
    nodes, outputs = versioned(recording.nodes, recording.outputs, recording.inputs)
    emitter.uses = Counter(ref.storage for node in nodes for ref in node.reads)
    emitter.uses.update(ref.storage for ref in outputs)
    for i, ref in enumerate(recording.inputs):
        emitter.values[ref.storage] = Stored(At(Slot.ARGUMENTS + i), ref.dtype.itemsize)
        if ref is recording.row_members:
            emitter.row_members = (At(Slot.ARGUMENTS + i), ref.size[0])
    for node in nodes:
        lower(emitter, node)
    first_output = Slot.ARGUMENTS + len(recording.inputs)
    for i, ref in enumerate(outputs):
        place, stride = At(first_output + i), contiguous(ref.size)
        if emitter.typed or ref.dtype in emitter.floats:
            emitter.expression(Leaf(ref), ref.size, place, stride, emitter.code(ref.dtype))
        else:  # steps compute in float32
            copy_out(emitter, ref, place)
    return outputs
