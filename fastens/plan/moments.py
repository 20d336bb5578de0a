"""Moments of groups of channels, taken by what writes an image; joined images are read as two."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from fastens.plan import calls as run
from fastens.plan.dataflow import Dataflow
from fastens.plan.launch import Launch, View
from fastens.reference.group_moments import counts


@dataclasses.dataclass
class _Wanted:
    """Moments that a norm reads: of which images, in how many groups of all their channels."""

    launch: Launch
    images: list[View]
    groups: int

    @property
    def channels(self) -> int:
        """Of all images."""
        return sum(image.size[1] for image in self.images)


def skip_joins(flow: Dataflow) -> None:
    """Let convolutions read two joined images where they are; moments of the joined image stay for later."""
    for join in list(flow.launches):
        if join.function is not run.join or join.args[2] != 1 or len(join.args[1]) != 2:
            continue
        whole, images = join.args[:2]
        readers = flow.readers(whole)
        single = flow.writer(whole) is join and all(flow.writer(image) is not None for image in images)
        same = single and all(image.is_dense() and flow.dtype(image) == flow.dtype(whole) for image in images)
        if not same or not readers or not all(_can_skip(reader, whole) for reader in readers):
            continue
        for reader in readers:
            if reader.function is run.moments:
                reader.args = (reader.args[0], images, *reader.args[2:])
            else:
                reader.args = (reader.args[0], images[0], *reader.args[2:])
                reader.kwargs["skip"] = images[1]
        flow.swap(join, None)


def _can_skip(launch: Launch, whole: View) -> bool:
    if launch.function is run.moments:
        return isinstance(launch.args[1], View) and launch.args[1].same_image(whole)
    if launch.function is not run.conv2d or launch.kwargs.get("skip") is not None or launch.kwargs["shared"]:
        return False
    reads = [view for view in launch.reads() if view.where is whole.where]
    return len(reads) == 1 and launch.args[1] == whole


def place_moments(flow: Dataflow) -> None:
    """Let what writes an image take its moments, in groups as fine as any norm of it needs."""
    wanted = [
        _Wanted(launch, launch.args[1] if isinstance(launch.args[1], list) else [launch.args[1]], launch.args[2])
        for launch in flow.launches
        if launch.function is run.moments
    ]
    ends = {id(flow.writer(view)) for view in flow.outputs.args[1]}
    last = [want for want in wanted if any(id(reader) in ends for reader in flow.readers(want.launch.args[0]))]
    sizes = _group_sizes(wanted, last)
    taken: dict[Any, View] = {}
    for want in wanted:
        parts = [_taken(flow, want, image, sizes, taken) for image in want.images]
        groups = 0 if len(parts) == 1 and parts[0].size[1] == want.groups else want.groups
        old = want.launch.args[0]
        for reader in list(flow.readers(old)):
            _read_instead(reader, old, parts, groups)
        flow.swap(want.launch, None)


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
    if name in taken:
        return taken[name]
    groups, spans = image.size[1] // sizes[name], len(counts(math.prod(image.size[2:])))
    stride = (groups * spans * 2, spans * 2, 2, 1)
    wide = torch.promote_types(flow.dtype(image), torch.float32)
    made = taken[name] = View(
        flow.new_buffer(image.size[0] * stride[0], wide), 0, (image.size[0], groups, spans, 2), stride
    )
    before = flow.writer(image)
    free = before is not None and before.function is run.conv2d and "found" not in before.kwargs
    if free and before.args[0].same_image(image):  # pyright: ignore[reportOptionalMemberAccess]
        before.kwargs |= {"found": made, "num_groups": groups}  # pyright: ignore[reportOptionalMemberAccess]
    else:
        backend = want.launch.args[3]
        flow.launches.insert(flow.position(want.launch), Launch("moments", run.moments, (made, image, groups, backend)))
    flow.index()
    return made


def _read_instead(launch: Launch, old: View, parts: list[View], groups: int) -> None:
    settings = launch.kwargs if launch.function is run.conv2d else launch.args[2]
    assert settings["moments"] == old
    settings["moments"] = parts[0]
    settings["skip_moments"] = parts[1] if len(parts) == 2 else None
    settings["norm_groups"] = groups
