"""Which folded layer stands for which layer, and what every folded layer does around its op."""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fastens.fold.looped import run_looped
from fastens.fold.member_tensor import MemberTensor
from fastens.fold.memory_cap import is_out_of_memory
from fastens.fold.rows import NotFoldable, Rows

_REGISTRY: dict[type[nn.Module], type["FoldedLayer"]] = {}


def register_layer(layer_class: type[nn.Module], folded_class: type["FoldedLayer"]) -> None:
    """Teach the fold a layer: modules of exactly ``layer_class`` become ``folded_class``.

    Subclasses do not match their base, since their forward may differ; register them by name where it does not.

    Args:
        layer_class: a module class that owns parameters or buffers.
        folded_class: a subclass of :class:`FoldedLayer`.

    Raises:
        TypeError: the arguments are not such classes.
    """
    if not (isinstance(layer_class, type) and issubclass(layer_class, nn.Module)):
        raise TypeError(f"register_layer: {layer_class!r} is not a torch.nn.Module class")
    if not (isinstance(folded_class, type) and issubclass(folded_class, FoldedLayer)):
        raise TypeError(f"register_layer: {folded_class!r} is not a subclass of fastens.fold.registry.FoldedLayer")
    _REGISTRY[layer_class] = folded_class
    folded_class_of.cache_clear()


class FoldedModule(nn.Module):
    """A module of the folded network that owns tensors: stacks [K, ...] under the names of the member's tensors.

    Its own code and that of its neighbours read a stacked tensor as a :class:`MemberTensor`; :meth:`stack` gives the
    stack itself. The module keeps the attributes of the member's layer.
    """

    rows: Rows
    path: str
    skeleton: list[nn.Module]  # in a list, so that it is not registered as a child
    shared: frozenset[str] = frozenset()
    looped: str | None = None
    batch_dim: int | None = 0
    layout: Any = None
    run_by: str = "reference"  # the code that runs it, as the report says

    def stack(self, name: str) -> Tensor | None:
        """The stack [K, ...] of one of the layer's tensors, none where the layer has none."""
        tensor = self._parameters.get(name)
        return self._buffers.get(name) if tensor is None else tensor


class FoldedLayer(FoldedModule):
    """A registered layer: implement :meth:`fold_forward`, and ``register_layer`` it."""

    def fold_forward(self, x: Any, offsets: Tensor | None, /, *args: Any, **kwargs: Any) -> Any:
        """Evaluate the layer for rows grouped by member.

        Args:
            x: [R, ...], the layer's first argument, batch first.
            offsets: int64 [K+1], the first row of each member's group and R; none for K equal groups.
            *args: the layer's other arguments, as they are.
            **kwargs: likewise.

        Returns:
            The layer's output, [R, ...].

        Raises:
            NotFoldable: this configuration of the layer has no member-batched form; it is looped.
        """
        raise NotImplementedError

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Bring the rows to dimension 0, evaluate, and put them back."""
        if self.looped is not None:
            return run_looped(self, (x, *args), kwargs)
        try:
            return self._batched(x, *args, **kwargs)
        except NotFoldable as error:
            self.looped = str(error)
            return run_looped(self, (x, *args), kwargs)

    def _batched(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(x, MemberTensor):
            return MemberTensor(self.fold_forward(x.stack, None, *args, **kwargs), self.rows)
        if self.rows.num_members == 1:
            return self.fold_forward(x, None, *args, **kwargs)
        dim = self.batch_dim
        if dim is None or not self._carries_rows(x, dim):  # the same input for all: each member's answer to it
            shared = x.expand(self.rows.num_members, *x.shape)
            return MemberTensor(self.fold_forward(shared, None, *args, **kwargs), self.rows)
        if dim == 0:
            return self.fold_forward(x, self.rows.scaled_offsets(x.shape[0]), *args, **kwargs)
        moved = x.movedim(dim, 0)
        return self.fold_forward(moved, self.rows.scaled_offsets(moved.shape[0]), *args, **kwargs).movedim(0, dim)

    def _carries_rows(self, x: Tensor, dim: int) -> bool:
        total = self.rows.total
        return x.ndim > dim and (x.shape[dim] == 0 if total == 0 else x.shape[dim] % total == 0)


class RawModule(FoldedModule):
    """A module that is not registered: its own forward on the folded batch, its parameters as member tensors."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the member's own forward; loop the module where that has no member-batched form."""
        if self.looped is not None:
            return run_looped(self, args, kwargs)
        if not self.rows.probing or torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)
        try:
            return super().forward(*args, **kwargs)
        except Exception as error:  # whatever it is, the loop decides whether it is the member's own error
            if is_out_of_memory(error):
                raise
            self.looped = f"{type(error).__name__}: {error}" if not isinstance(error, NotFoldable) else str(error)
            return run_looped(self, args, kwargs)


def _reader(name: str) -> property:
    def read(self: FoldedModule) -> Any:
        tensor = self.stack(name)
        if tensor is None or name in self.shared:
            return tensor
        return tensor[0] if self.rows.num_members == 1 else MemberTensor(tensor, self.rows)

    return property(read)


@cache
def folded_class_of(layer_class: type[nn.Module], names: tuple[str, ...]) -> type[FoldedModule]:
    """The class that a module of ``layer_class`` with tensors ``names`` takes in the folded network.

    It also derives from ``layer_class``, so that ``isinstance`` and the layer's own methods keep working.
    """
    folded = _REGISTRY.get(layer_class, RawModule)
    readers = {name: _reader(name) for name in names}
    return type(f"Folded{layer_class.__name__}", (folded, layer_class), readers)  # pyright: ignore[reportReturnType]


def is_registered(layer: nn.Module) -> bool:
    """Whether exactly the class of ``layer`` has a folded counterpart."""
    return type(layer) in _REGISTRY
