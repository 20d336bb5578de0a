"""The generators that a sampler's code draws from: torch's, NumPy's, Python's and its own."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastens.device import random_states, set_random_states


class GeneratorStates:
    """The generators that the runs draw from, as they were before."""

    def __init__(self) -> None:
        self._torch = torch.get_rng_state()
        self._of_gpus = random_states()
        self._numpy, self._python = np.random.get_state(), random.getstate()
        self._own: dict[int, tuple[torch.Generator, Tensor]] = {}

    def note(self, generator: Any) -> None:
        """Keep the state of a sampler's own generator that is about to be drawn from."""
        if isinstance(generator, torch.Generator):
            self._own.setdefault(id(generator), (generator, generator.get_state()))

    def restore(self) -> None:
        """Let everything draw again what it drew."""
        torch.set_rng_state(self._torch)
        set_random_states(self._of_gpus)
        np.random.set_state(self._numpy)
        random.setstate(self._python)
        for generator, state in self._own.values():
            generator.set_state(state)
