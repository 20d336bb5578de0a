"""The passes that make few launches of many, in their order."""

from __future__ import annotations

from collections.abc import Callable

from fastens.plan.gpu.dataflow import Dataflow
from fastens.plan.gpu.passes.copies import (
    collapse_dimensions,
    convolve_what_was_copied,
    enter_in_the_dtype_read,
    fuse_elementwise,
    return_what_was_copied,
    write_in_place,
)
from fastens.plan.gpu.passes.epilogues import activate_once, add_residuals
from fastens.plan.gpu.passes.layers import merge_linear_layers, split_linear_layers, stack_layers
from fastens.plan.gpu.passes.masks import draw_together
from fastens.plan.gpu.passes.moments import place_moments, skip_joins

Pass = Callable[[Dataflow], None]
PASSES: tuple[Pass, ...] = (
    # Copies are still nodes of their own, so that what reads one can be told from what reads its source.
    return_what_was_copied,
    convolve_what_was_copied,
    Dataflow.remove_unread,
    fuse_elementwise,
    enter_in_the_dtype_read,
    fuse_elementwise,
    # Elementwise chains are whole: one node adds the residual and multiplies by the number.
    add_residuals,
    # The residual is added before an activation: what has taken one in keeps its result as it is.
    activate_once,
    # Prologues and epilogues are what they will be, by which layers of the same input are found.
    stack_layers,
    # Joins that only put elementwise results together go; then those that convolutions can read as two images.
    write_in_place,
    fuse_elementwise,
    skip_joins,
    # Who writes each image is settled, and so who can take its moments.
    place_moments,
    # What is left without prologue and epilogue is a linear layer; one that is read in parts is several first.
    split_linear_layers,
    merge_linear_layers,
    draw_together,
    # Passes match views dimension by dimension, so that these are joined last.
    collapse_dimensions,
    Dataflow.remove_unread,
)


def rewrite(flow: Dataflow) -> None:
    """Apply all passes in turn."""
    for rewriting in PASSES:
        rewriting(flow)
        flow.index()
