"""A sampler as runs of every member call it."""

from __future__ import annotations

import contextlib
import functools
import inspect
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastens.ensemble import Ensemble
from fastens.ops._scores import seed_from


class SamplerCall:
    """A sampler, the ensemble that it calls, and its arguments.

    Attributes:
        rows_last: whether arrays that it makes of tensors are its samples, row by row, and nothing comes after them.
    """

    def __init__(self, function: Callable[..., Any], ensemble: Ensemble, arguments: dict[str, Any]) -> None:
        self.function, self.ensemble, self.arguments = function, ensemble, arguments
        self.rows_last = False
        self._names = inspect.signature(function).parameters

    @classmethod
    def of(cls, sampler: Any, ensemble: Ensemble | None, num_samples: int, arguments: dict[str, Any]) -> SamplerCall:
        """Find out what a sampler is, and which ensemble it calls."""
        if not callable(sampler):
            raise TypeError(f"sample_members: sampler is a {type(sampler).__name__}, expected one that can be called")
        parts = getattr(sampler, "components", None)
        if isinstance(parts, dict):  # a diffusers pipeline
            return cls._of_pipeline(sampler, list(parts.values()), ensemble, num_samples, arguments)
        if ensemble is None:
            ensemble = getattr(getattr(sampler, "denoiser", None), "model", None)
        if not isinstance(ensemble, Ensemble):
            found = "none" if ensemble is None else f"a {type(ensemble).__name__}"
            raise TypeError(
                f"sample_members: expected the fastens.Ensemble that the sampler calls, got {found}; pass ensemble="
            )
        return cls(functools.partial(sampler, num_samples), ensemble, arguments)

    @classmethod
    def _of_pipeline(
        cls, pipeline: Any, parts: list[Any], ensemble: Ensemble | None, num_samples: int, arguments: dict[str, Any]
    ) -> SamplerCall:
        found = [part for part in parts if isinstance(part, Ensemble)] if ensemble is None else [ensemble]
        if len(found) != 1:
            raise TypeError(
                f"sample_members: the pipeline has {len(found)} ensembles among its parts, expected one; pass ensemble="
            )
        call = cls(pipeline, found[0], {"output_type": "np", **arguments})
        for name in ("batch_size", "num_images_per_prompt"):
            if name in call._names:
                call.arguments.setdefault(name, num_samples)
                break
        call.rows_last = True
        return call

    @contextlib.contextmanager
    def seeded(self, generator: torch.Generator | int | None) -> Iterator[None]:
        """Give the sampler its generator or seed, or seed torch's own for the time of the run."""
        if "generator" in self._names:
            if generator is not None and not isinstance(generator, torch.Generator):
                generator = torch.Generator(self.ensemble.device).manual_seed(_seed(generator))
            self.arguments.setdefault("generator", generator)
            yield
        elif "seed" in self._names:
            if generator is not None:
                self.arguments["seed"] = _seed(generator)
            yield
        elif generator is None:
            yield
        else:
            with torch.random.fork_rng():
                torch.manual_seed(_seed(generator))
                yield

    def samples(self, output: Any) -> Any:
        """The samples in what a pipeline returned; what any other sampler returned is its samples."""
        return output[0] if self.rows_last else output


def _seed(generator: Any) -> int:
    """What a sampler is seeded with: a seed as it is, unsigned where that was given, else one read from a generator."""
    seed = seed_from(generator)
    return seed if isinstance(generator, torch.Generator) else operator.index(generator)
