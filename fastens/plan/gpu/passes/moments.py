"""Moments of groups of channels, taken by what writes an image; joined images are read as two."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from fastens.plan.gpu.dataflow import Dataflow
from fastens.plan.gpu.launch import Conv, GroupNorm, Join, Moments, MomentsOfTwo
from fastens.plan.graph import Node, View
from fastens.reference.group_moments import counts


@dataclasses.dataclass
class _Wanted:
    """Moments that a norm reads: of which images, in how many groups of all their channels."""

    node: Moments
    images: list[View]
    groups: int

    @property
    def channels(self) -> int:
        """How many channels the images have together."""
        return sum(image.size[1] for image in self.images)


def skip_joins(flow: Dataflow) -> None:
    """conv(join(x, y))  ->  conv(x, prologue.skip=y); moments of the joined image are placed later."""
    for join in list(flow.nodes):
        if not isinstance(join, Join) or join.up != 1 or len(join.images) != 2:
            continue
        whole, (first, second) = join.out, join.images
        readers = flow.readers(whole)
        single = flow.writer(whole) is join and all(flow.writer(image) is not None for image in join.images)
        same = single and all(image.is_dense() and image.dtype == whole.dtype for image in join.images)
        if not same or not readers or not all(_can_skip(reader, whole) for reader in readers):
            continue
        for reader in readers:
            if isinstance(reader, Moments):
                flow.swap(reader, MomentsOfTwo(reader.out, first, reader.num_groups, second))
            elif isinstance(reader, Conv):
                reader.change(x=first, skip=second)
        flow.swap(join, None)


def _can_skip(node: Node, whole: View) -> bool:
    if isinstance(node, Moments):
        return not isinstance(node, MomentsOfTwo) and node.x.same_image(whole)
    if not isinstance(node, Conv) or node.block.prologue.skip is not None or node.block.shared:
        return False
    reads = [view for view in node.reads() if view.where is whole.where]
    return len(reads) == 1 and node.block.x == whole


def place_moments(flow: Dataflow) -> None:
    """moments(conv(x))  ->  conv(x, epilogue.num_groups), in groups as fine as any norm of the image needs."""
    wanted = [
        _Wanted(node, [node.x, *([node.skip] if isinstance(node, MomentsOfTwo) else [])], node.num_groups)
        for node in flow.nodes
        if isinstance(node, Moments)
    ]
    ends = {id(flow.writer(view)) for view in flow.outputs.views}
    last = [want for want in wanted if any(id(reader) in ends for reader in flow.readers(want.node.out))]
    sizes = _group_sizes(wanted, last)
    taken: dict[Any, View] = {}
    for want in wanted:
        parts = [_taken(flow, want, image, sizes, taken) for image in want.images]
        groups = 0 if len(parts) == 1 and parts[0].size[1] == want.groups else want.groups
        old = want.node.out
        for reader in list(flow.readers(old)):
            _read_instead(reader, old, parts, groups)
        flow.swap(want.node, None)


def _name(image: View) -> Any:
    """What tells images apart by: where they are, and not in which lines."""
    return image.where, image.offset, *image.size[:2], math.prod(image.size[2:])


def _group_sizes(wanted: list[_Wanted], last: list[_Wanted]) -> dict[Any, int]:
    """Channels of a group by image: those of images that are normalised together are the same.

    They are powers of two, which a convolution takes moments of as it writes, but where the norm is before the
    ``last`` convolution: summed over the members, that takes the groups of its norm.
    """
    sizes = {_name(image): 0 for want in wanted for image in want.images}
    for want in wanted:
        channels = want.channels // want.groups
        size = channels if want in last else channels & -channels
        sizes.update({_name(image): math.gcd(size, sizes[_name(image)]) for image in want.images})
    changed = True
    while changed:
        changed = False
        for want in wanted:
            names = [_name(image) for image in want.images]
            size = math.gcd(want.channels // want.groups, *(sizes[n] for n in names))
            size = math.gcd(size, *(image.size[1] for image in want.images))
            changed = changed or any(sizes[n] != size for n in names)
            sizes.update(dict.fromkeys(names, size))
    return sizes


def _taken(flow: Dataflow, want: _Wanted, image: View, sizes: dict[Any, int], taken: dict[Any, View]) -> View:
    """The moments of an image."""
    name = _name(image)
    # what is written to in between has others each time
    if name in taken and flow.is_settled(want.node):
        return taken[name]
    groups, spans = image.size[1] // sizes[name], len(counts(math.prod(image.size[2:])))
    stride = (groups * spans * 2, spans * 2, 2, 1)
    wide = torch.promote_types(image.dtype, torch.float32)
    made = taken[name] = View(
        flow.new_buffer(image.size[0] * stride[0], wide), 0, (image.size[0], groups, spans, 2), stride
    )
    before = flow.writer(image)
    if isinstance(before, Conv) and before.moments is None and before.out.same_image(image):
        before.moments = made
        before.change(num_groups=groups)
    else:
        flow.nodes.insert(flow.position(want.node), Moments(made, image, groups))
    flow.index()
    return made


def _read_instead(node: Node, old: View, parts: list[View], groups: int) -> None:
    assert isinstance(node, Conv | GroupNorm)
    prologue = node.block.prologue if isinstance(node, Conv) else node.prologue
    assert prologue.moments == old
    first, *rest = parts
    prologue = prologue._replace(moments=first, skip_moments=rest[0] if rest else None, norm_groups=groups)
    if isinstance(node, Conv):
        node.block = node.block._replace(prologue=prologue)
    else:
        node.prologue = prologue
