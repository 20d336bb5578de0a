"""The arguments of one call: what all members see, what each has of its own, and which carry the batch's rows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fastens.engine.copies import check_shapes, copies, is_plain
from fastens.fold.dispatch import Fold
from fastens.fold.nested import is_shape
from fastens.fold.tensor import MemberTensor

_LEAVES = frozenset(
    {Tensor, torch.nn.Parameter, int, float, bool, str, type(None), torch.dtype, torch.device, torch.Size}
)


def _flattened(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
    """Return the leaves, and how they are nested: the positional count and the keywords where no argument is nested."""
    leaves = [*args, *kwargs.values()]
    if not torch.compiler.is_compiling() and _LEAVES.issuperset(map(type, leaves)):
        return leaves, (len(args), tuple(kwargs))
    return pytree.tree_flatten((args, kwargs), is_leaf=is_shape)


class PerMember:
    """An argument of which every member has its own: ``ens(x, t, fastens.PerMember([c_0, ..., c_K-1]))``.

    Args:
        values: K tensors of one shape, or K numbers, which a member gets as tensors of no dimension (float64, int64).

    Raises:
        ValueError: no values, or tensors of different shapes.
        TypeError: values that are neither tensors nor numbers.
    """

    def __init__(self, values: Sequence[Tensor | float]) -> None:
        values = list(values)
        if not values:
            raise ValueError("PerMember has no values, expected one for each member")
        if not all(isinstance(v, Tensor | int | float) for v in values):
            kinds = sorted({type(v).__name__ for v in values})
            raise TypeError(f"PerMember takes tensors or numbers, got {', '.join(kinds)}")
        tensors = [v if isinstance(v, Tensor) else _exact(v) for v in values]
        if len({x.shape for x in tensors}) > 1:
            raise ValueError(f"PerMember: the values are of shapes {[list(x.shape) for x in tensors]}, expected one")
        self.stack = torch.stack(tensors)

    @classmethod
    def of(cls, stack: Tensor) -> PerMember:
        """Values that are stacked already, [K, ...]."""
        made = cls.__new__(cls)
        made.stack = stack
        return made

    def check(self, num_members: int) -> None:
        """Raise ValueError unless there is a value for each of K members."""
        if len(self) != num_members:
            raise ValueError(f"PerMember has {len(self)} values, expected one for each of {num_members} members")

    def __len__(self) -> int:
        return len(self.stack)


def _exact(number: float) -> Tensor:
    """Return a number as a tensor [] with all its digits, which leaves the dtype of tensors that meet it alone."""
    return torch.tensor(number, dtype=torch.float64 if isinstance(number, float) else None)


class Arguments:
    """The arguments of one call, flattened.

    Args:
        args: positional arguments.
        kwargs: keyword arguments.
        num_members: K, to check :class:`PerMember` against.

    Attributes:
        leaves: the arguments' leaves; of a :class:`PerMember` its stack [K, ...].
        own: positions of leaves that are stacks with one entry for each member.
        per_row: positions of leaves that have an entry for each row, which a member sees alone; see :meth:`of_rows`.
        begun: the evaluation that it is, where that draws numbers of its own; none before.
        evaluation: seed of the trajectory and number of the evaluation, on which fresh dropout masks depend.
        num_samples: how many samples there are; row r belongs to sample r % n. Zero for as many as rows.
        samples: int64 [B], the sample of each row, where rows were selected or samples are numbered; else none.
        varying: of the numbers that had several values, by position, another one than now.
        free: positions of those that had so many that there may be any.
        owned: whether the tensors are copies, which a network may write to.

    Raises:
        ValueError: a :class:`PerMember` of another number of values than K.
        TypeError: a nested tensor of the layout that has no shape.
    """

    begun: Any = None
    evaluation: tuple[int | None, int] = (None, 0)
    num_samples: int = 0
    samples: Tensor | None = None
    varying: Mapping[int, float] = MappingProxyType({})
    free: frozenset[int] = frozenset()
    own: frozenset[int] = frozenset()
    per_row: frozenset[int] = frozenset()
    owned: bool = False
    _found: tuple[int | None, frozenset[int]] | None = None

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], num_members: int | None = None) -> None:
        self.leaves, self._nesting = _flattened(args, kwargs)
        check_shapes(self.leaves)
        if isinstance(self._nesting, tuple):
            return
        self.own = frozenset(i for i, x in enumerate(self.leaves) if isinstance(x, PerMember))
        for i in self.own:
            if num_members is not None:
                self.leaves[i].check(num_members)
            self.leaves[i] = self.leaves[i].stack

    def of_members(self, own: Iterable[int], num_members: int) -> Arguments:
        """The same call, of whose leaves those at some positions are what a :class:`PerMember` holds."""
        other = copy.copy(self)
        other.own, other._found = self.own.union(own), None
        for i in other.own:
            PerMember.of(other.leaves[i]).check(num_members)
        return other

    @property
    def _rows(self) -> tuple[int | None, frozenset[int]]:
        if self._found is None:
            self._found = self._find_rows()
        return self._found

    def _find_rows(self) -> tuple[int | None, frozenset[int]]:
        """The position of the tensor that shows the batch, and of those that look like it."""
        shaped = [(i, self._shape(i)) for i, x in enumerate(self.leaves) if isinstance(x, Tensor)]
        shaped = [(i, shape) for i, shape in shaped if shape]
        primary = next((i for i, shape in shaped if len(shape) > 1), shaped[0][0] if shaped else None)
        size = None if primary is None else self._shape(primary)[0]
        return primary, frozenset(i for i, shape in shaped if shape[0] == size)

    @property
    def rows_at(self) -> frozenset[int]:
        """Positions of leaves that carry the batch in dimension 0, as far as their size tells."""
        return self._rows[1]

    @property
    def _primary(self) -> int | None:
        return self._rows[0]

    def _copy(self) -> Arguments:
        """Return a copy to be given other leaves; which of them carry rows stays what these leaves tell."""
        _ = self._rows
        return copy.copy(self)

    def _shape(self, i: int) -> torch.Size:
        """The shape that a member sees."""
        return self.leaves[i].shape[1:] if i in self.own else self.leaves[i].shape

    @property
    def primary(self) -> int:
        """The position of the tensor that shows the batch: the first of at least two dimensions, else of one.

        Raises:
            TypeError: there is none.
        """
        if self._primary is None:
            raise TypeError("an ensemble needs at least one tensor argument that carries the batch in dimension 0")
        return self._primary

    @property
    def batch(self) -> Tensor:
        """The tensor that shows the batch, [B, ...]; a stack [K, B, ...] where each member has its own."""
        return self.leaves[self.primary]

    @property
    def members_batch(self) -> Tensor:
        """The tensor that shows the batch as a member sees it, [B, ...]; the first's where each has its own."""
        return self.batch[0] if self.primary in self.own else self.batch

    @property
    def batch_size(self) -> int:
        """B, 1 where nothing shows it."""
        return 1 if self._primary is None else self._shape(self._primary)[0]

    def excluding(self, positions: frozenset[int]) -> Arguments:
        """The same call, where the leaves at these positions only look like the batch."""
        if not positions:
            return self
        other = self._copy()
        other._found = self._primary, self.rows_at - positions
        return other

    @property
    def tensors(self) -> list[Tensor]:
        """The leaves that are tensors."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    @property
    def _same(self) -> tuple[int, ...]:
        """For each tensor the position of the first that is the same object; empty where all differ."""
        ids = [id(x) for x in self.leaves if isinstance(x, Tensor)]
        return () if len(set(ids)) == len(ids) else tuple(map(ids.index, ids))

    def _each(self, function: Callable[[int, Any], Any]) -> list[Any]:
        """Return ``function(position, leaf)`` of every leaf; two leaves that are one tensor get one result."""
        made: dict[Any, Any] = {}
        found = []
        for i, x in enumerate(self.leaves):
            key = (id(x), i in self.own, i in self.rows_at, i in self.per_row) if isinstance(x, Tensor) else i
            if key not in made:
                made[key] = function(i, x)
            found.append(made[key])
        return found

    def with_tensors(self, tensors: list[Tensor]) -> Arguments:
        """The same arguments with other tensors in the place of theirs."""
        other, same = self._copy(), self._same
        replacements = iter([tensors[i] for i in same] if same else tensors)
        other.leaves = [next(replacements) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        other.owned = False
        return other

    def _with_leaves(self, leaves: list[Any]) -> Any:
        if not isinstance(self._nesting, tuple):
            return pytree.tree_unflatten(leaves, self._nesting)
        count, names = self._nesting
        return tuple(leaves[:count]), dict(zip(names, leaves[count:], strict=True))

    @property
    def call(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What an ensemble of these members is called with."""
        return self._with_leaves([PerMember.of(x) if i in self.own else x for i, x in enumerate(self.leaves)])

    # What one pass, one member, or some rows get

    def bound(self, fold: Fold) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a pass of all its members."""
        hidden = fold.hidden

        def leaf(i: int, x: Any) -> Any:
            if not isinstance(x, Tensor):
                return self._number(fold, i, x)
            if i in self.own:
                return MemberTensor(hidden.entries(x), hidden)
            return fold.common(x)

        return self._with_leaves(self._each(leaf))

    def bound_rows(self, fold: Fold) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a pass whose hidden dimension is the rows: a logical batch of one for each."""

        def leaf(i: int, x: Any) -> Any:
            if not isinstance(x, Tensor):
                return self._number(fold, i, x)
            if i in self.per_row:
                return MemberTensor(x, fold.hidden)
            if i in self.rows_at:
                return MemberTensor(x.unsqueeze(1), fold.hidden)
            return fold.common(x)

        return self._with_leaves(self._each(leaf))

    def _number(self, fold: Fold, i: int, x: Any) -> Any:
        return fold.numbers.argument(fold, i) if fold.numbers is not None and i in self.varying else x

    def of_member(self, k: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of member k alone, in memory of its own: it may write to them."""
        owned = self if self.owned else self.copied()
        return self._with_leaves(owned._each(lambda i, x: x[k] if i in self.own else x))

    def selected(self, index: Tensor) -> Arguments:
        """The arguments for the samples ``index``, int64 [n]."""

        def leaf(i: int, x: Any) -> Any:
            if i not in self.rows_at | self.per_row:
                return x
            return x.index_select(1 if i in self.own else 0, index.to(x.device))

        other = self._copy()
        other.leaves = self._each(leaf)
        samples = index % max(self.num_samples, 1) if self.num_samples else index
        other.samples = samples if self.samples is None else self.samples.index_select(0, index)
        return other

    def of_rows(self, members: Tensor) -> Arguments:
        """The arguments of rows that have a member each, ``members`` int64 [B]: of :class:`PerMember`, its member's."""

        def leaf(i: int, x: Any) -> Any:
            if i not in self.own:
                return x
            at = members.to(x.device)
            row = torch.arange(len(at), device=x.device)
            return x[at, row] if i in self.rows_at else x.index_select(0, at)

        other = self._copy()
        other.leaves = self._each(leaf)
        other.own, other.per_row = frozenset(), self.own - self.rows_at
        return other

    def copied(self) -> Arguments:
        """The same call on copies of the tensors, for a network that writes to its arguments."""
        other = self.with_tensors(copies(self.tensors))
        other.owned = True
        return other

    def share_memory(self) -> bool:
        """Whether a network that writes to one of the tensors may change another."""
        tensors = [x for x in self.tensors if is_plain(x)]
        return len({x.untyped_storage()._cdata for x in tensors}) < len(tensors)

    # What tells calls apart

    def plan_key(self, varying: Collection[int] = ()) -> tuple[Any, ...]:
        """The key of a plan: everything of a call but the values of its tensors, strides and devices included.

        Args:
            varying: positions of numbers that are inputs of the plan.
        """
        key = [self._nesting, self.own, self.per_row, self._same]
        for i, leaf in enumerate(self.leaves):
            if isinstance(leaf, Tensor):
                key += (leaf.shape, leaf.stride(), leaf.dtype, leaf.device)
            else:
                key += (type(leaf), "any" if i in varying else _told_apart(leaf))
        return tuple(key)

    def kind(self) -> tuple[Any, ...]:
        """The key under which numbers are seen to vary: shapes, dtypes and types, without values and strides."""

        def key(leaf: Any) -> Any:
            return (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else type(leaf)

        return (*map(key, self.leaves), self._nesting, self.own, self.per_row)

    def with_numbers(self, values: Mapping[int, float]) -> Arguments:
        """The same arguments with other numbers at these positions."""
        other = self._copy()
        other.leaves = [values.get(i, leaf) for i, leaf in enumerate(self.leaves)]
        return other

    def plain(self) -> bool:
        """Whether :meth:`plan_key` says everything: leaves are ordinary tensors, numbers, names or dtypes."""
        return all(map(is_plain, self.leaves))

    def signature(self) -> tuple[Any, ...]:
        """The key of a folded signature: structure, shapes, dtypes, and what is no tensor by value; not strides."""

        def key(i: int, leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                return leaf.shape, leaf.dtype, leaf.device.type
            if i in self.free:
                return type(leaf)
            try:
                hash(leaf)
            except TypeError:
                return type(leaf)
            return type(leaf) if type(leaf) is float and leaf not in (0.0, 1.0) else (type(leaf), _told_apart(leaf))

        return (*map(key, range(len(self.leaves)), self.leaves), self._nesting, self.own, self.per_row, self._same)

    def described(self, how: str = "") -> str:
        """The call as a report prints it: ``float32[2, 3, 8, 8], int64[2]``, after how it is made if not so."""
        leaves = [f"each its {_shown(x)}" if i in self.own else _shown(x) for i, x in enumerate(self.leaves)]
        if isinstance(self._nesting, tuple):
            count, names = self._nesting
            leaves[count:] = [f"{name}={leaf}" for name, leaf in zip(names, leaves[count:], strict=True)]
        return f"{how}: {', '.join(leaves)}" if how not in ("", "forward") else ", ".join(leaves)


def _shown(leaf: Any) -> str:
    """A leaf as a report prints it: numbers by type, since any may come."""
    if isinstance(leaf, Tensor):
        return f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}"
    return type(leaf).__name__ if type(leaf) in (int, float) else str(leaf)[:40]


def _told_apart(leaf: Any) -> Any:
    """What a leaf that is no tensor is in a key: 0.0 and -0.0, which are equal, are two."""
    return float.hex(leaf) if isinstance(leaf, float) else leaf
