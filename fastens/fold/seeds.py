"""Whether a network seeds torch's global generator, by which every member would draw the same numbers."""

from __future__ import annotations

import torch


class Seeds:
    """The global generator as the pass left it: where it began, and after each draw."""

    def __init__(self) -> None:
        self._seed, self._last = torch.initial_seed(), _state(torch.default_generator)
        self._asked = False

    def set_since(self) -> bool:
        """Whether the generator was seeded since the pass began, or since its last draw; a draw follows."""
        self._asked, seed = True, torch.initial_seed()
        if seed != self._seed:
            return True
        fresh = _state(torch.Generator().manual_seed(seed))
        return self._last != fresh and _state(torch.default_generator) == fresh

    def drawn(self) -> None:
        """Note where a draw left the generator, which may be where it was: a dropout of nothing draws nothing."""
        if self._asked:
            self._asked, self._last = False, _state(torch.default_generator)


def _state(generator: torch.Generator) -> bytes:
    return generator.get_state().numpy().tobytes()
