"""Reading a view of a copied tensor from where the copy came from, so that the copy need not be made."""

from __future__ import annotations

import dataclasses

from fastens.plan.layout import Factors, followed, joined
from fastens.plan.lowering.builder import Builder
from fastens.plan.lowering.values import Apply, Expression, Leaf
from fastens.program.steps import Opcode
from fastens.trace.record import Ref


@dataclasses.dataclass(frozen=True)
class Origin:
    """The elements of a view, times a number, in the storage that they were copied from."""

    ref: Ref  # of that storage and its offset; size and strides are those of `dims`, one after the other
    dims: list[Factors]  # of each dimension of the view
    scale: float

    def simple(self) -> Ref | None:
        """The view itself with strides of the origin, none where a dimension has several."""
        if any(len(factors) > 1 for factors in self.dims):
            return None
        pairs = [factors[0] if factors else (1, 0) for factors in self.dims]
        return dataclasses.replace(self.ref, size=tuple(n for n, _ in pairs), stride=tuple(s for _, s in pairs))


def origin(builder: Builder, ref: Ref, scaled: bool = False, moved: bool = False) -> Origin:
    """Follow a view back through copies that were not made yet.

    Args:
        builder: knows which those are.
        ref: the view.
        scaled: follow multiplications and divisions by a number too; only for what goes into softmax, since the scale
            is the product of factors and reciprocals, rounded once.
        moved: follow no conversion to half precision. Products and norms in half precision may take what was converted,
            where what moves values passes on those that the network asked for.
    """
    dims: list[Factors] = [[(n, s)] if n > 1 else [] for n, s in zip(ref.size, ref.stride, strict=True)]
    storage, offset, dtype, scale = ref.storage, ref.offset, ref.dtype, 1.0
    while isinstance(value := builder.values.get(storage), Expression):
        if value.rounds and (moved or ref.dtype != value.ref.dtype):
            break
        root, number = value.root, 1.0
        if scaled and isinstance(root, Apply) and root.opcode in (Opcode.MULTIPLY_NUMBER, Opcode.DIVIDE_NUMBER):
            number = 1 / root.number if root.opcode is Opcode.DIVIDE_NUMBER and root.number else root.number
            if not number:
                break
            root = root.operands[0]
        if not isinstance(root, Leaf) or root.ref.size != value.ref.size or not root.ref.dtype.is_floating_point:
            break
        found = followed(value.ref, root.ref, offset, dims)
        if found is None:
            break
        offset, dims = found[0], [joined(factors) for factors in found[1]]
        storage, dtype, scale = root.ref.storage, root.ref.dtype, scale * number
    flat = [pair for factors in dims for pair in factors]
    size, stride = tuple(n for n, _ in flat), tuple(s for _, s in flat)
    return Origin(Ref(storage, offset, size, stride, dtype), dims, scale)
