"""Several ways to compute one op, and the choice among them: measured once per shape, dtype and device, then looked up.

:mod:`fastens.ops._table` keeps what was measured. ``FASTENS_CHOOSE="conv=grouped"`` forces a way wherever it can be
taken.
"""

from __future__ import annotations

import functools
import os
import pathlib
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack

from fastens import reproducible
from fastens.device import GPUS, capturing, device_of
from fastens.ops._clock import clock as device_clock
from fastens.ops._table import TABLE, Entry, Table

ROUNDS = 5  # interleaved rounds of a measurement at most
FEWEST_ROUNDS = 2
BUDGET = 0.25  # seconds of one measurement, behind which no further round begins
HOPELESS = 2.0  # a way whose best round takes so many times the fastest one's is in no further round
MARGIN = 0.03  # another way must be this much faster than the default, or noise would choose
AGREEMENT = {torch.float64: 1e-9, torch.float32: 1e-2, torch.float16: 2e-2, torch.bfloat16: 5e-2}  # with TF32 products


@dataclass(frozen=True)
class Way:
    """One way to compute an op.

    Attributes:
        run: called with the op's arguments.
        refuses: called with the op's arguments; why this way cannot take them, or none.
    """

    run: Callable[..., Tensor]
    refuses: Callable[..., str | None] = lambda *_: None


class Choice:
    """The ways of one op. The first takes all arguments and is the default where nothing can be measured.

    Args:
        op: name of the op.
        key: called with the op's arguments; a string that says everything that their speed depends on but the device.
        ways: by name, the default first; more may be added.
        table: where measurements are kept.
        clock: called with a function and a device, it returns what times one call of the function, in seconds.
        devices: device types on which the choice is measured; elsewhere ``rule`` decides.
        rule: called with the op's arguments, where no derivative is wanted; the way to take, none for the default.
    """

    def __init__(
        self,
        op: str,
        key: Callable[..., str],
        ways: dict[str, Way],
        *,
        table: Table = TABLE,
        clock: Callable[[Callable[[], Any], torch.device], Callable[[], float]] = device_clock,
        devices: Sequence[str] = GPUS,
        rule: Callable[..., str | None] = lambda *_: None,
    ) -> None:
        self.op = op
        self.key = key
        self.ways = ways
        self.default = next(iter(ways))
        self.table = table
        self.clock = clock
        self.devices = tuple(devices)
        self.rule = rule
        self.observer: Callable[[Choice, Sequence[Any]], None] | None = None  # told of each call instead of a choice
        self._known: dict[Any, str] = {}
        CHOICES[op] = self

    def choose(self, arguments: Sequence[Any], device: torch.device, way: str = "auto", ruled: bool = True) -> str:
        """Return the name of the way to take.

        In order: ``way`` where it names one, ``$FASTENS_CHOOSE`` where that way takes the arguments, the table, a
        measurement, or the rule where nothing is measured: on other devices, and while a graph is recorded. Where no
        choice can be made (a compiler or a transform at work, a derivative wanted), it is the default, and where
        ``ruled`` is false in place of the rule.

        Raises:
            ValueError: ``way`` is unknown, or does not take these arguments.
        """
        if way != "auto":
            if way not in self.ways:
                raise ValueError(f"{self.op}: way {way!r} is unknown, expected 'auto' or one of {', '.join(self.ways)}")
            why = self.ways[way].refuses(*arguments)
            if why is not None:
                raise ValueError(f"{self.op}: {way!r} does not take these arguments: {why}")
            return way
        if torch.compiler.is_compiling():
            return self.default
        if self.observer is not None:
            self.observer(self, arguments)
            return self.default
        forced = self._forced_way(arguments)
        if forced is not None:
            return forced
        if device.type not in self.devices or reproducible.enabled():  # a measurement comes out as it does
            return (self.rule(*arguments) if ruled and can_measure() else None) or self.default
        found = self._found(arguments, device)
        if found is None:
            if not can_measure():
                return (self.rule(*arguments) if ruled and _is_plain() else None) or self.default
            _notice(device, self.table.path)
            started = time.monotonic()
            found = self._keep(self.measure(arguments, device), arguments, device)
            _spent[device] = _spent.get(device, 0.0) + time.monotonic() - started
        return found

    def known(self, arguments: Sequence[Any], device: torch.device) -> str | None:
        """Return what :meth:`choose` takes now, None where it would measure first."""
        forced = self._forced_way(arguments)
        if forced is None and device.type not in self.devices:
            return self.rule(*arguments) or self.default
        return forced or self._found(arguments, device)

    def _forced_way(self, arguments: Sequence[Any]) -> str | None:
        forced = _forced(os.environ.get("FASTENS_CHOOSE", "")).get(self.op)
        if forced not in self.ways:
            return None
        return forced if self.ways[forced].refuses(*arguments) is None else self.default

    def _found(self, arguments: Sequence[Any], device: torch.device) -> str | None:
        """Return the measured best, None where there is no measurement."""
        key = self.key(*arguments)
        known = self._known.get((device, key))
        if known is None:
            entry = self.table.find(device_of(device).name, self.op, key)
            known = None if entry is None else self._keep(entry, arguments, device)
        return known

    def _keep(self, entry: Entry, arguments: Sequence[Any], device: torch.device) -> str:
        # a shipped table may name a way that this installation lacks
        fits = entry["chosen"] in self.ways and self.ways[entry["chosen"]].refuses(*arguments) is None
        found = self._known[device, self.key(*arguments)] = entry["chosen"] if fits else self.default
        return found

    def measure(self, arguments: Sequence[Any], device: torch.device) -> Entry:
        """Time every way that takes the arguments and agrees with the default; add the result to the table."""
        expected = self.ways[self.default].run(*arguments)
        clocks: dict[str, Callable[[], float]] = {}
        failed: dict[str, str] = {}
        lasting = True
        for name, way in self.ways.items():
            if way.refuses(*arguments) is not None:
                continue
            try:
                why = _disagreement(way.run(*arguments), expected)
                if why is None:
                    clocks[name] = self.clock(functools.partial(way.run, *arguments), device)
            except Exception as error:  # Triton's, such as OutOfResources, share no base with torch's
                why = f"{type(error).__name__}: {error}"[:200]
                lasting = lasting and not isinstance(error, torch.OutOfMemoryError)
            if why is not None:
                failed[name] = why
        medians = _medians(clocks)
        best = min(medians, key=lambda name: medians[name], default=self.default)
        if self.default in medians and medians[best] > (1 - MARGIN) * medians[self.default]:
            best = self.default
        entry = {"chosen": best, "seconds": medians, "failed": failed, "torch": torch.__version__}
        if lasting:  # another process may have the memory that was lacking
            self.table.add(device_of(device).name, self.op, self.key(*arguments), entry)
        return entry

    def forget(self) -> None:
        """Look choices up again, after the table was changed."""
        self._known.clear()


def _medians(clocks: dict[str, Callable[[], float]]) -> dict[str, float]:
    """The seconds of each way, in interleaved rounds, as many as the budget has time for; none of a single way."""
    seconds: dict[str, list[float]] = {name: [] for name in clocks}
    left = dict(clocks)
    started = time.monotonic()
    for round_ in range(ROUNDS if len(clocks) > 1 else 0):
        if len(left) < 2 or (round_ >= FEWEST_ROUNDS and time.monotonic() - started > BUDGET):
            break
        for name, once in left.items():
            seconds[name].append(once())
        fastest = min(min(values) for values in seconds.values())
        left = {name: once for name, once in left.items() if min(seconds[name]) <= HOPELESS * fastest}
    return {name: statistics.median_low(values) for name, values in seconds.items() if values}


CHOICES: dict[str, Choice] = {}


def observed() -> bool:
    """Whether calls are collected now, and must come to the choices."""
    return any(choice.observer is not None for choice in CHOICES.values())


NOTICE_AFTER = 5.0  # seconds of measuring, compilers included
_spent: dict[torch.device, float] = {}
_noticed: set[torch.device] = set()


def _notice(device: torch.device, path: pathlib.Path) -> None:
    """Say once why a first call takes so long."""
    if _spent.get(device, 0.0) > NOTICE_AFTER and device not in _noticed:
        _noticed.add(device)
        warnings.warn(
            f"fastens: measuring which kernels suit these shapes on {device_of(device).name}; this is done once and "
            f"kept in {path}. `fastens tune` does it ahead of use",
            stacklevel=2,
        )


@functools.lru_cache(maxsize=8)
def _forced(text: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in text.split(",") if part]
    return {op.strip(): way.strip() for op, _, way in pairs}


def _is_plain() -> bool:
    """Whether real tensors are computed on now, without derivative or transform."""
    return (
        not torch.is_grad_enabled() and torch._C._len_torch_dispatch_stack() == 0 and peek_interpreter_stack() is None
    )


def can_measure() -> bool:
    """Whether timing makes sense now: plain, and no graph is recorded."""
    return _is_plain() and not capturing()


def _disagreement(actual: Tensor, expected: Tensor) -> str | None:
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return f"gives {actual.dtype} {list(actual.shape)}, expected {expected.dtype} {list(expected.shape)}"
    if expected.numel() == 0:
        return None
    finite = expected.isfinite()
    if not torch.equal(finite, actual.isfinite()):
        return "is finite where the default is not, or the other way round"
    scale = expected.where(finite, 0).double().abs().max().clamp_min(1e-30)
    error = float((actual.double() - expected.double()).where(finite, 0).abs().max() / scale)
    return None if error <= AGREEMENT.get(expected.dtype, 0.0) else f"relative error {error:.1e}"
