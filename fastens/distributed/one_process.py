"""What only an ensemble in one process does."""

from __future__ import annotations

from typing import Any


class OfOneProcess:
    """Methods that over a mesh raise, and say what to do."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Raise TypeError: a process group is of one process."""
        raise TypeError(
            "an ensemble over a mesh is not copied or pickled; distribute the ensemble again, and save its state by "
            "torch.distributed.checkpoint"
        )

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        """Raise ValueError: no rank has all stacks."""
        raise ValueError(
            "no rank has all members: write state_dict() by torch.distributed.checkpoint.save, and read it into the "
            "ensemble of one process by torch.distributed.checkpoint.load"
        )

    def replace_member(self, *_: Any, **__: Any) -> None:
        """Raise ValueError: only one rank has the member."""
        raise ValueError("members are on several ranks: replace the member in the ensemble, and distribute it again")

    @property
    def members(self: Any) -> Any:
        """Raise ValueError: no rank has all members."""
        raise ValueError("no rank has all members; take them from the ensemble that was distributed")

    def _why_not_recorded(self) -> str | None:
        return "members are on several ranks, and what they send each other is no part of a recording"
