"""Whether a network seeds torch's global generator, by which every member would draw the same numbers."""

from __future__ import annotations

import torch


class Seeds:
    """The global generator as it is where a pass begins."""

    def __init__(self) -> None:
        self._seed, self._last = torch.initial_seed(), _state(torch.default_generator)

    def set_since(self) -> bool:
        """Whether the generator was seeded since the pass began, or since this was asked for the last draw."""
        seed = torch.initial_seed()
        if seed != self._seed:
            return True
        last, self._last = self._last, None  # a draw follows
        fresh = _state(torch.Generator().manual_seed(seed))
        return last != fresh and _state(torch.default_generator) == fresh


def _state(generator: torch.Generator) -> bytes:
    return generator.get_state().numpy().tobytes()
