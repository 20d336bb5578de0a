"""Random networks and calls in numbers: ``python -m tests.fuzz --networks 10000 --seed 0 --jobs 2``.

Prints the shares that were folded, looped and planned, and why not, and every fault with its seed and a small case that
shows it. ``--case "Case(Network(...), ...)"`` runs one that was printed.
"""

import argparse
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection, wait

import torch

from tests.fuzz.cases import draw_case, read_case, run_case
from tests.fuzz.plain import Rounded
from tests.fuzz.run import Case, Outcome
from tests.fuzz.shrink import kind, shrunk, source

CONTEXT = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
TOP = 12
NAMES = ("wholly", "partly", "looped", "own", "asked", "unknown", "float32", "planned", "wrong", "raised", "crashed")
SAID = {
    "wholly": "folded without any looped module",
    "partly": "folded, some modules looped",
    "looped": "looped as a whole",
    "unknown": "raised before it could say",
    "asked": 'engine="loop"',
    "own": "of these, members that differ in Python or read values of their own, and must be looped",
    "float32": "in float32, the others in float64",
    "crashed": "ended or hung their process",
}


def work(pipe: Connection, shrinks: bool, only: str | None, draw: Callable[[int], Case]) -> None:
    """Run the seeds that come through a pipe, and send each one's outcome back."""
    torch.set_num_threads(1)
    while (seed := pipe.recv()) is not None:
        try:
            outcome = run_case(filtered(draw(seed), only))
            small = source(shrunk(outcome.case, run_case, 60)) if shrinks and outcome.fault else ""
            pipe.send((seed, outcome, small, ""))
        except Exception:
            pipe.send((seed, None, "", traceback.format_exc()))


def filtered(case: Case, only: str | None) -> Case:
    """The case with the steps that were asked for."""
    if not only:
        return case
    names = only.split(",")
    wanted = {name for name in names if not name.startswith("-")}
    left_out = {name[1:] for name in names if name.startswith("-")}
    steps = tuple(s for s in case.steps if s[0] not in left_out and (not wanted or s[0] in wanted))
    return replace(case, steps=steps)


class Tally:
    """What is counted over all networks."""

    def __init__(self) -> None:
        self.networks = self.calls = 0
        self.shares: Counter[str] = Counter()
        self.looped: Counter[str] = Counter()
        self.unplanned: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.invalid: Counter[str] = Counter()
        self.magnified: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.features: Counter[str] = Counter()
        self.broken: list[int] = []

    def add(self, seed: int, outcome: Outcome) -> None:
        """Count one."""
        self.networks += 1
        self.calls += outcome.calls
        self.shares[outcome.folded] += 1
        self.shares["planned"] += outcome.planned
        self.shares["float32"] += outcome.case.network.dtype == "float32"
        self.shares["own"] += outcome.case.network.tagged("own_python") and outcome.folded != "asked"
        self.looped.update(set(outcome.why_looped))
        self.refused.update(outcome.refused)
        self.invalid.update(outcome.invalid)
        if outcome.magnified:
            self.magnified[f"in {outcome.magnified.step}"] += 1
        if not outcome.planned:
            looped = outcome.folded in ("looped", "asked")
            self.unplanned["looped" if looped else outcome.why_no_plan or "no reason given"] += 1
        if outcome.fault:
            self.shares[outcome.fault.outcome] += 1
            why = outcome.fault.why if outcome.fault.outcome == "raised" else ""
            self.faults[f"{outcome.fault.outcome} in {outcome.fault.step}: {why}"] += 1
            self.features.update({name for name, _ in outcome.case.network.blocks})

    def __str__(self) -> str:
        n = max(self.networks, 1)
        lines = [f"{self.networks} networks, {self.calls} calls"]
        for name in NAMES:
            lines.append(f"  {100 * self.shares[name] / n:6.2f} %  {self.shares[name]:6d}  {SAID.get(name, name)}")
        share = 100 * self.shares["planned"] / max(self.shares["float32"], 1)
        lines.append(f"  {share:6.2f} %  of those in float32, the only ones that can be, are planned")
        for title, counter in (
            ("why looped", self.looped),
            ("why not planned", self.unplanned),
            ("refused, as may be", self.refused),
            ("the loop itself raised", self.invalid),
            ("rounding that the network magnifies, no fault", self.magnified),
            ("faults", self.faults),
            ("features in networks with faults", self.features),
        ):
            if counter:
                lines.append(f"{title} ({sum(counter.values())}):")
                lines += [f"  {count:6d}  {what}" for what, count in counter.most_common(TOP)]
        if self.broken:
            lines.append(f"the suite itself failed on seeds {self.broken}")
        return "\n".join(lines)


def run(
    seeds: list[int], jobs: int, shrinks: bool, limit: float, only: str | None, draw: Callable[[int], Case]
) -> Tally:
    """Run seeds in processes of their own, so that a crash or a hang is one fault."""
    tally, waiting = Tally(), list(reversed(seeds))
    workers: dict[Connection, tuple[multiprocessing.process.BaseProcess, int, float]] = {}

    def start() -> None:
        ours, theirs = CONTEXT.Pipe()
        process = CONTEXT.Process(target=work, args=(theirs, shrinks, only, draw), daemon=True)
        process.start()
        theirs.close()
        give(ours, process)

    def give(pipe: Connection, process: multiprocessing.process.BaseProcess) -> None:
        seed = waiting.pop() if waiting else None
        pipe.send(seed)
        if seed is None:
            workers.pop(pipe, None)
        else:
            workers[pipe] = (process, seed, time.monotonic())

    for _ in range(min(jobs, len(seeds))):
        start()
    while workers:
        for pipe in wait(list(workers), timeout=1.0):
            assert isinstance(pipe, Connection)
            process, seed, _ = workers[pipe]
            try:
                _, outcome, small, error = pipe.recv()
            except EOFError:
                process.join()
                if loop_crashes(draw(seed), limit):
                    tally.networks += 1
                    tally.invalid["it crashed"] += 1
                else:
                    lost(tally, draw(seed), f"crashed, exit status {process.exitcode}")
                del workers[pipe]
                if waiting:
                    start()
                continue
            if outcome is None:
                tally.broken.append(seed)
                print(f"seed {seed}: the suite itself failed\n{error}", flush=True)
            else:
                tally.add(seed, outcome)
                if outcome.fault:
                    print(f"seed {seed}: {outcome.fault.outcome} in {outcome.fault.step}: {outcome.fault.why}")
                    print(f"  {small or source(outcome.case)}", flush=True)
            give(pipe, process)
        for pipe, (process, seed, since) in list(workers.items()):
            if time.monotonic() - since > limit:
                process.kill()
                process.join()
                lost(tally, draw(seed), f"took more than {limit:.0f} s")
                del workers[pipe]
                if waiting:
                    start()
    return tally


def loop_crashes(case: Case, limit: float) -> bool:
    """Whether torch crashes under the members alone, without any ensemble."""
    process = CONTEXT.Process(target=run_case, args=(case, Rounded), daemon=True)
    process.start()
    process.join(limit)
    process.kill()
    process.join()
    return process.exitcode in (-signal.SIGSEGV, -signal.SIGFPE, -signal.SIGABRT, -signal.SIGBUS, -signal.SIGILL)


def lost(tally: Tally, case: Case, why: str) -> None:
    """Count a case whose process ended or hung."""
    tally.networks += 1
    tally.shares["crashed"] += 1
    tally.faults[f"crashed: {why}"] += 1
    print(f"seed {case.network.seed}: {why}\n  {source(case)}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--networks", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the first network; the next has the next")
    parser.add_argument("--jobs", type=int, default=1, help="processes, each on one thread")
    parser.add_argument(
        "--limit", type=float, default=180.0, help="seconds that a network may take, shrinking included"
    )
    parser.add_argument("--length", type=int, help="steps of each sequence, instead of three to eight")
    parser.add_argument(
        "--samplers", type=int, default=0, help="how many samplers, of 10 to 200 calls each, run in each sequence"
    )
    parser.add_argument("--steps", help="only these steps of a sequence, by name, with commas; -name: all but this one")
    parser.add_argument("--no-shrink", action="store_true", help="print failing cases as they are")
    parser.add_argument("--case", help="run one case, as printed, and shrink it")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    if options.case:
        outcome = run_case(read_case(options.case))
        print(outcome)
        if kind(outcome):
            print(source(shrunk(outcome.case, run_case)))
        return int(outcome.fault is not None)
    began = time.monotonic()
    seeds = list(range(options.seed, options.seed + options.networks))
    draw = partial(draw_case, length=options.length, samplers=options.samplers)
    tally = run(seeds, options.jobs, not options.no_shrink, options.limit, options.steps, draw)
    print(f"\nseeds {options.seed} to {options.seed + options.networks - 1}, {time.monotonic() - began:.0f} s\n{tally}")
    return int(tally.shares["wrong"] + tally.shares["raised"] + tally.shares["crashed"] > 0 or bool(tally.broken))


if __name__ == "__main__":
    sys.exit(main())
