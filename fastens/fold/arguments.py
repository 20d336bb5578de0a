"""Which of the caller's tensors carry the batch, and how they are repeated or selected for the fold."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor


class Arguments:
    """The arguments of one call, flattened, with the leaves that carry the batch marked.

    The batch is dimension 0 of the first tensor of at least two dimensions (else one); every tensor with as many
    entries in dimension 0 carries it, except those whose position is in ``excluded``.

    Attributes:
        leaves: the arguments' leaves.
        batched: positions of the leaves that carry the batch.
        batch_size: B.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], excluded: frozenset[int] = frozenset()) -> None:
        self._given = args, kwargs
        self.leaves, self._spec = pytree.tree_flatten((args, kwargs))
        shaped = [(i, x) for i, x in enumerate(self.leaves) if isinstance(x, Tensor) and x.ndim > 0]
        primary = next(((i, x) for i, x in shaped if x.ndim > 1), shaped[0] if shaped else None)
        if primary is None:
            raise TypeError("an ensemble needs at least one tensor argument that carries the batch in dimension 0")
        self.primary = primary[0]
        self.batch_size: int = primary[1].shape[0]
        self.batched = [i for i, x in shaped if x.shape[0] == self.batch_size and i not in excluded]

    def excluding(self, excluded: frozenset[int]) -> "Arguments":
        """The same call, where the leaves at these positions only look like the batch."""
        return Arguments(*self._given, excluded) if excluded else self

    @property
    def tensors(self) -> list[Tensor]:
        """The leaves that are tensors."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    def with_tensors(self, tensors: list[Tensor]) -> "Arguments":
        """The same arguments with other tensors in the place of theirs."""
        other = copy.copy(self)
        replacements = iter(tensors)
        other.leaves = [next(replacements) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        return other

    def plan_key(self) -> tuple[Any, ...]:
        """What tells one recorded pass from another: all of a call but the values of its tensors."""

        def key(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                return leaf.shape, leaf.stride(), leaf.dtype
            return type(leaf), leaf

        return (*map(key, self.leaves), self._spec)

    def plain(self) -> bool:
        """Whether :meth:`plan_key` says everything: leaves are tensors, numbers, names or dtypes."""
        return all(isinstance(leaf, Tensor | int | float | str | torch.dtype | None) for leaf in self.leaves)

    @property
    def batch(self) -> Tensor:
        """The tensor that shows the batch, [B, ...]."""
        return self.leaves[self.primary]

    @property
    def call(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What a network is called with."""
        return pytree.tree_unflatten(self.leaves, self._spec)

    def mapped(self, function: Callable[[Tensor], Tensor]) -> "Arguments":
        """The arguments with ``function`` applied to each tensor that carries the batch."""
        other = copy.copy(self)
        other.leaves = list(self.leaves)
        for i in self.batched:
            other.leaves[i] = function(other.leaves[i])
        return other

    def repeated(self, num_members: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a folded pass: the batch once per member, [K*B, ...], member-major."""
        return self.mapped(lambda x: x.repeat(num_members, *(1,) * (x.ndim - 1))).call

    def selected(self, index: Tensor) -> "Arguments":
        """The arguments for the samples ``index``, int64 [n]."""
        return self.mapped(lambda x: x.index_select(0, index.to(x.device)))

    def fold_rows(self, start: int, stop: int) -> Tensor:
        """The samples of rows ``start`` to ``stop`` of a folded pass, as :meth:`selected` takes them."""
        return torch.arange(start, stop) % self.batch_size

    def of_member(self, k: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of member k alone: the same for all."""
        return self.call

    def signature(self) -> tuple[Any, ...]:
        """What tells one kind of call from another: structure, shapes, dtypes, and switches by value."""

        def key(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                return leaf.shape, leaf.dtype, leaf.device.type
            if leaf is None or isinstance(leaf, bool | str) or (isinstance(leaf, float) and leaf in (0.0, 1.0)):
                return leaf  # a probability of 0 or 1, such as of dropping a label, is a switch too
            return type(leaf)

        return (*map(key, self.leaves), self._spec)


class MemberArguments(Arguments):
    """The arguments of a call that gives each member rows of its own.

    The first tensor of at least two dimensions is [K, B, ...], and so is every tensor whose first two dimensions are
    these. A tensor [B, ...] is the same for all members; the rest is passed as it is.

    Args:
        num_members: K.
        args: positional arguments.
        kwargs: keyword arguments.
        excluded: positions of leaves that only look like [B, ...].

    Raises:
        ValueError: the first tensor has not one group of rows per member.
    """

    def __init__(
        self, num_members: int, args: tuple[Any, ...], kwargs: dict[str, Any], excluded: frozenset[int] = frozenset()
    ) -> None:
        self._num_members = num_members
        self._given = args, kwargs
        self.leaves, self._spec = pytree.tree_flatten((args, kwargs))
        shapes = {i: x.shape for i, x in enumerate(self.leaves) if isinstance(x, Tensor)}
        primary = next((i for i, shape in shapes.items() if len(shape) > 1), None)
        if primary is None or shapes[primary][0] != num_members:
            found = "no tensor of two dimensions" if primary is None else f"{list(shapes[primary])}"
            raise ValueError(
                f"each member takes rows of its own: expected a tensor [{num_members}, B, ...], got {found}"
            )
        self.primary = primary
        self.batch_size: int = shapes[primary][1]
        own = [i for i, shape in shapes.items() if shape[:2] == (num_members, self.batch_size)]
        common = [i for i, shape in shapes.items() if shape[:1] == (self.batch_size,) and i not in {*own, *excluded}]
        self.batched = sorted([*own, *common])
        for i in own:
            self.leaves[i] = self.leaves[i].flatten(0, 1)
        for i in common:
            self.leaves[i] = self.leaves[i].repeat(num_members, *(1,) * (len(shapes[i]) - 1))

    def excluding(self, excluded: frozenset[int]) -> Arguments:
        """The same call, where the leaves at these positions only look like [B, ...]."""
        return MemberArguments(self._num_members, *self._given, excluded) if excluded else self

    def repeated(self, num_members: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a folded pass, [K*B, ...], member-major."""
        return self.call

    def fold_rows(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of a folded pass."""
        return torch.arange(start, stop)

    def of_member(self, k: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of member k alone: its own rows."""
        return self.mapped(lambda x: x.narrow(0, k * self.batch_size, self.batch_size)).call

    def signature(self) -> tuple[Any, ...]:
        """As for other calls, and which leaves carry rows."""
        return ("members", *self.batched, *super().signature())


def establish_excluded(
    run_member: Callable[[tuple[Any, ...], dict[str, Any]], Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> frozenset[int] | None:
    """Find tensors that only happen to be as long as the batch.

    A member is run on the batch and on the batch twice over; the arguments that carry the batch are those that have
    to be doubled for the result to double.

    Returns:
        Positions of the leaves to leave alone, or none where no choice explains the member.
    """
    everything = Arguments(args, kwargs)
    once = [x for x in pytree.tree_leaves(run_member(args, kwargs)) if isinstance(x, Tensor)]
    candidates = [i for i in everything.batched if i != everything.primary]
    for excluded in [frozenset({i}) for i in candidates] + [frozenset(candidates)]:
        doubled = Arguments(args, kwargs, excluded).repeated(2)
        try:
            twice = [x for x in pytree.tree_leaves(run_member(*doubled)) if isinstance(x, Tensor)]
        except Exception:
            continue
        if len(once) == len(twice) and all(
            a.ndim == 0 or (b.shape[0] == 2 * a.shape[0] and torch.allclose(b, torch.cat([a, a]), 1e-3, 1e-4))
            for a, b in zip(once, twice, strict=True)
        ):
            return excluded
    return None
