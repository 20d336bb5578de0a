"""Layers that are not made of torch functions, taught to the fold by a folded counterpart."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastens.fold.dispatch import Fold
from fastens.fold.nested import plain
from fastens.fold.stand_ins import standing_in
from fastens.fold.tensor import MemberTensor, NotFoldable, member_valued
from fastens.network.tables import Stacks, as_seen

_REGISTRY: dict[type[nn.Module], type[FoldedLayer]] = {}


def register_layer(layer_class: type[nn.Module], folded_class: type[FoldedLayer]) -> None:
    """Teach the fold a layer whose own code is not made of torch functions; layers that are need no entry.

    Modules of exactly ``layer_class`` are then evaluated by ``folded_class``, in ensembles made afterwards. Subclasses
    do not match their base, since their forward may differ; register them by name where it does not.

    Args:
        layer_class: a module class that owns parameters or buffers.
        folded_class: a subclass of :class:`FoldedLayer`.

    Raises:
        TypeError: the arguments are not such classes.
    """
    if not (isinstance(layer_class, type) and issubclass(layer_class, nn.Module)):
        raise TypeError(f"register_layer: {layer_class!r} is not a torch.nn.Module class")
    if not (isinstance(folded_class, type) and issubclass(folded_class, FoldedLayer)):
        raise TypeError(f"register_layer: {folded_class!r} is not a subclass of fastens.network.registry.FoldedLayer")
    _REGISTRY[layer_class] = folded_class


class FoldedLayer:
    """A registered layer of all members: implement :meth:`fold_forward`, and ``register_layer`` it.

    Attributes of the member's layer are read through to it; :meth:`stack` gives its tensors.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self._fold: Fold | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "layer":
            raise AttributeError(name)
        return getattr(self.layer, name)

    def stack(self, name: str) -> Tensor | None:
        """The stack [K, ...] of one of the layer's tensors, none where the layer has none."""
        for table in (self.layer._parameters, self.layer._buffers):
            if name in table:
                tensor = dict.__getitem__(table, name)
                tensor = None if tensor is None else as_seen(standing_in(tensor))
                if tensor is None or not isinstance(table, Stacks) or name not in table.common:
                    return tensor
                return tensor.expand(table.num_members, *tensor.shape)
        return None

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
            NotFoldable: this configuration of the layer has no member-batched form.
        """
        raise NotImplementedError


class _Forward:
    """Stands for the forward of a registered layer in a folded network."""

    def __init__(self, layer: nn.Module, folded_class: type[FoldedLayer]) -> None:
        self.layer = layer
        self.folded_class = folded_class

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        from fastens.fold.dispatch import current_fold

        fold = current_fold()
        if fold is None:
            return type(self.layer).forward(self.layer, x, *args, **kwargs)
        rest = [plain(a) for a in (*args, *kwargs.values())]
        if (fold.hidden.num_members != fold.hidden.size and fold.hidden.offsets is None) or any(
            map(member_valued, rest)
        ):
            raise NotFoldable(
                f"the registered layer {type(self.layer).__name__} takes one member-valued argument of all members"
            )
        offsets = fold.hidden.scaled_offsets(x.shape[0])
        out = self.folded_class(self.layer).fold_forward(
            fold.rows(x), offsets, *map(plain, args), **{n: plain(v) for n, v in kwargs.items()}
        )
        return fold.unrows(out) if not isinstance(out, MemberTensor) else out


def fold_registered(network: nn.Module) -> None:
    """Let the registered layers of a folded network be evaluated by their counterparts."""
    for module in network.modules():
        folded_class = _REGISTRY.get(type(module))
        if folded_class is not None:
            module.__dict__["forward"] = _Forward(module, folded_class)
