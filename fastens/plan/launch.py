"""A launch of a plan on a GPU: a call, and the views of memory that it reads and writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from fastens.plan.record import mapped
from fastens.plan.views import Factors, followed, joined


@dataclasses.dataclass(frozen=True)
class Entry:
    """An input of the pass as launches read it: copied, as it is given, to these strides and this dtype."""

    number: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclasses.dataclass(frozen=True)
class View:
    """Elements of a buffer, an entry, an output or a constant: offset and strides in elements."""

    where: Any
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def same_image(self, other: View) -> bool:
        """Whether both are the same channels of the same pixels, [R, C, *space] with the space in any lines."""
        rows = self.size[0] == 1 or self.stride[0] == other.stride[0]
        channels = self.size[1] == 1 or self.stride[1] == other.stride[1]
        if (self.where, self.offset, *self.size[:2]) != (other.where, other.offset, *other.size[:2]):
            return False
        return rows and channels and self._space() == other._space()

    def _space(self) -> Factors:
        return joined([(n, s) for n, s in zip(self.size[2:], self.stride[2:], strict=True) if n > 1][::-1])

    def is_dense(self) -> bool:
        """Whether an image [R, C, H, W] has its channels last, and nothing between its elements."""
        _, channels, height, width = self.size
        expected = (height * width * channels, 1, width * channels, channels)
        return all(n == 1 or s == e for n, s, e in zip(self.size, self.stride, expected, strict=True))

    def through(self, copy: View, source: View) -> View | None:
        """The same elements where ``copy`` was copied from, none where that is no view."""
        found = factors_through(self, copy, source)
        if found is None or any(len(factors) > 1 for factors in map(joined, found[1])):
            return None
        return View(source.where, found[0], self.size, tuple(s[0][1] if s else 0 for s in map(joined, found[1])))


def factors_through(view: View, copy: View, source: View) -> tuple[int, list[Factors]] | None:
    """Offset of a view of ``copy`` in its source, and what each dimension is made of there, innermost first."""
    if view.where is not copy.where and view.where != copy.where:
        return None
    sizes = list(zip(view.size, view.stride, strict=True))
    found = followed(copy, source, view.offset, [[(n, s)] if n > 1 and s else [] for n, s in sizes])
    if found is None:
        return None
    repeated = [[(n, 0)] if n > 1 and not s else [] for n, s in sizes]
    return found[0], [once or again for once, again in zip(found[1], repeated, strict=True)]


@dataclasses.dataclass(eq=False)
class Launch:
    """A call: ``args`` and ``kwargs`` hold a :class:`View` where a tensor will be; the first argument is written."""

    name: str
    function: Callable[..., None]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)

    def writes(self) -> list[View]:
        """What it writes."""
        return views((self.args[0], self.kwargs.get("found")))

    def reads(self) -> list[View]:
        """What it reads."""
        return views((self.args[1:], {name: value for name, value in self.kwargs.items() if name != "found"}))

    def replace(self, old: View, new: View) -> None:
        """Read something else instead of ``old``."""
        change = lambda view: new if view == old else view  # noqa: E731
        self.args = (self.args[0], *mapped(View, change, self.args[1:]))
        self.kwargs = {
            name: value if name == "found" else mapped(View, change, value) for name, value in self.kwargs.items()
        }


def views(tree: Any) -> list[View]:
    """All views among arguments."""
    found: list[View] = []
    mapped(View, found.append, tree)
    return found
