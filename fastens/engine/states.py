"""The states of a call by name: what is known of each signature, and of the network as a whole.

A signature is unknown until its first call. Then it is folded, or looped; where a plan is wanted, it is planned or
refused. A call of a captured signature is answered before the engine hears of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar, TypeVar

from fastens.report import CallReport


@dataclasses.dataclass
class State:
    """What is known of one signature; of this class itself: nothing.

    Attributes:
        call: the signature as a report prints it.
        why: the reason for the state, or why it is no better; empty where there is none to give.
    """

    name: ClassVar[str] = "unknown"
    call: str = dataclasses.field(default="", kw_only=True)
    why: str = dataclasses.field(default="", kw_only=True)


@dataclasses.dataclass
class Folded(State):
    """The fold was held against the members; calls fold from now on."""

    name: ClassVar[str] = "folded"


@dataclasses.dataclass
class Looped(State):
    """Members are called one by one, in calls of this signature alone."""

    name: ClassVar[str] = "looped"


@dataclasses.dataclass
class Refused(State):
    """There is no plan of this signature, and none is tried while network and weights are as they were."""

    name: ClassVar[str] = "refused"


UNKNOWN = State()
Kind = TypeVar("Kind", bound=State)


class States:
    """The state of every signature that was called. Any number of threads may look and write.

    Attributes:
        filled: signatures of which all members have filled their caches.
        rows_by_plan: in deterministic mode, by signature of one row, whether a plan answered it first. It outlives the
            plans: a row that is answered otherwise later may have other last bits.
    """

    def __init__(self) -> None:
        self._of: dict[Any, State] = {}
        self.get = self._of.get  # as :meth:`of`, without a call of Python's; none of an unknown signature
        self.filled: set[Any] = set()
        self.rows_by_plan: dict[Any, bool] = {}

    def of(self, signature: Any) -> State:
        """The state of a signature."""
        return self._of.get(signature, UNKNOWN)

    def put(self, signature: Any, state: State) -> None:
        """Give a signature a state, as the newest."""
        self._of.pop(signature, None)
        self._of[signature] = state

    def all(self, kind: type[Kind]) -> list[Kind]:
        """Every state of a kind, the oldest first."""
        return [state for state in list(self._of.values()) if isinstance(state, kind)]

    def drop(self, *kinds: type[State], most: int = 0) -> None:
        """Forget the signatures of these kinds, but for the ``most`` newest."""
        found = [signature for signature, state in list(self._of.items()) if isinstance(state, kinds)]
        for signature in found[: max(0, len(found) - most)]:
            self._of.pop(signature, None)

    def clear(self) -> None:
        """Forget every signature, and which caches are filled."""
        self._of.clear()
        self.filled.clear()

    def reports(self) -> Iterator[CallReport]:
        """Each call once, the oldest first: that it is looped says most, then a plan, or why there is none."""
        found: dict[str, State] = {}
        for state in list(self._of.values()):
            if state.call not in found or type(found[state.call]) is Folded or type(state) is Looped:
                found[state.call] = state
        return (CallReport(call, state.name, state.why) for call, state in found.items())


@dataclasses.dataclass
class Behaviour:
    """What calls have shown of a network as a whole, for all signatures.

    Attributes:
        looped: whether members are called one by one.
        why: the reason for that, or for the fold.
        writes_itself: whether a pass changes the network's own Python state or buffers.
        writes_arguments: whether the network writes to its arguments, which are copied then.
        reads_rows: whether Python reads values of rows, in calls whose drawn rows are looped by themselves.
        wrapped: whether common values are wrapped in a pass, so that they can become member-valued in place.
    """

    looped: bool
    why: str
    writes_itself: bool = False
    writes_arguments: bool = False
    reads_rows: bool = False
    wrapped: bool = False

    @property
    def engine(self) -> str:
        """What an ensemble calls it: ``loop`` or ``fold``."""
        return "loop" if self.looped else "fold"
