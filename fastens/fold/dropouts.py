"""What the dropouts of a pass drop: what torch draws for each member, or what a subclass says."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

from fastens.trace.record import MaskInputs, Ref


class Dropouts:
    """Dropouts as torch draws them. It has no state, so that one is in all passes; :class:`MaskPass` is the other kind.

    Attributes:
        masked: whether dropouts drop by masks that are known, in evaluation mode too.
        fresh: whether masks depend on evaluation and sample, which are inputs of a plan then.
        functions: the functions whose masks are known: calls of those are handed to :meth:`dropout`.
        samples: int64 [R], the sample of each row, where masks are fresh.
    """

    masked = False
    fresh = False
    functions: Collection[Any] = frozenset()
    samples: Tensor | None = None

    def runs(self, network: Any) -> None:
        """Know the network that the pass runs, by whose modules dropouts are told apart."""

    def dropout(self, fold: Any, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """A call of one of :attr:`functions`."""
        raise NotImplementedError

    def attention(self, fold: Any, q: Any, k: Any, v: Any, mask: Any, bound: dict[str, Any]) -> Any:
        """Scaled dot-product attention whose weights are dropped; q, k, v [B, ..., tokens, width]."""
        raise NotImplementedError

    def counted(self) -> Mapping[str, int]:
        """How many dropouts each module has applied in this pass; a copy."""
        return {}

    def counting_from(self, calls: Mapping[str, int] | None) -> AbstractContextManager[None]:
        """Scope in which dropouts are counted on from ``calls``; none to go on. After it they are as before it."""
        return nullcontext()

    def check(self) -> None:
        """Raise where a whole pass has dropped nothing, and should have."""

    def as_factors(self) -> None:
        """Let masks that are recorded be factors, whose derivative is known, and not one operation."""

    # What a plan asks

    def inputs_of(self, drawn: Ref | None) -> MaskInputs | None:
        """What the recorded pass drew, where ``drawn`` is the input that fresh masks depend on; none of torch's."""
        return None

    def next_evaluation(self) -> Dropouts:
        """The dropouts of the evaluation after this one."""
        return self

    def drawn(self) -> Tensor:
        """What fresh masks depend on, int64."""
        raise NotImplementedError


BY_TORCH = Dropouts()
