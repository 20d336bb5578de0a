"""One network under one sequence of calls: the ensemble beside the loop over members of its own."""

import contextlib
import re
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

import fastens
from tests.fuzz import oracle
from tests.fuzz.inputs import Call, Form, copied, draw_form, make_call
from tests.fuzz.networks import Network, members_of
from tests.fuzz.oracle import Mismatch
from tests.fuzz.rounding import SMALL, WITNESS, own_rounding

Step = tuple[str, int]
RAN_AWAY = 1e18  # a score whose square is beyond float32: what overflows then is a matter of the order of operations


@dataclass(frozen=True)
class Case:
    """A network and what is done with it; the steps are names, each with its seed."""

    network: Network
    steps: tuple[Step, ...] = ()
    engine: str = "auto"
    max_fold: int | None = None
    built: str = "plain"  # or under inference_mode


@dataclass
class Fault:
    """The first call that was not answered as the loop answers it."""

    outcome: str  # wrong or raised
    step: str
    why: str
    size: float = float("inf")
    trained: bool = False  # gradients were involved


@dataclass
class Outcome:
    """What became of a case."""

    case: Case
    calls: int = 0
    fault: Fault | None = None
    refused: list[str] = field(default_factory=list)
    invalid: list[str] = field(default_factory=list)  # calls that the loop itself cannot answer
    folded: str = "unknown"  # wholly, partly, looped, or asked: looped since the case says so
    planned: bool = False
    why_looped: list[str] = field(default_factory=list)
    why_no_plan: str = ""
    warned: bool = False
    magnified: Fault | None = None  # a difference of roundings, which the network magnifies for the loop as well


class Stop(BaseException):
    """The sequence ends here: a fault, or a change that the members themselves do not take."""


class Skip(BaseException):
    """The step ends here: the loop itself raises."""


class Run:
    """The state of a case while its steps are taken."""

    def __init__(self, case: Case, make: Callable[..., Any] = fastens.Ensemble) -> None:
        self.case, self.spec, self.outcome = case, case.network, Outcome(case)
        self.dtype, self.training, self.rule = self.spec.torch_dtype, self.spec.training, "mean"
        self.trained = False
        self.remembers_draws = False  # whether members remember what they drew, each its own
        self.altered = False  # in something that its files do not hold
        self.coarsest = self.dtype  # that weights and state have gone through
        self.members = members_of(self.spec)
        self.step, self.allowed = "construction", case.engine == "fold"
        self.ensemble: Any = None
        options = {} if case.max_fold is None else {"max_fold": case.max_fold}
        handed_in = members_of(self.spec)
        with torch.inference_mode(case.built == "inference"):
            self.attempt(lambda: make(handed_in, engine=case.engine, **options), self._adopt)
        self.allowed = False

    def _adopt(self, ensemble: Any) -> None:
        self.ensemble = ensemble

    # What the network is, as far as a step has to know

    @property
    def random(self) -> bool:
        return self.spec.tagged("random", self.training)

    @property
    def stateful(self) -> bool:
        return self.spec.tagged("stateful", self.training)

    @property
    def mixing(self) -> bool:
        return self.spec.tagged("mixing", self.training)

    def form(self, draw: Random, rows: int | None = None) -> Form:
        return draw_form(self.spec, draw, rows)

    def make(self, draw: Random, form: Form | None = None) -> Call:
        return make_call(self.spec, form or self.form(draw), draw.randrange(2**30), self.dtype)

    def each(self, change: Callable[[Any], Any]) -> None:
        """Apply a change to the ensemble and to every member of the oracle."""
        self.own(lambda: [change(member) for member in self.members])
        self.attempt(lambda: change(self.ensemble))

    # Calls

    def attempt(self, call: Callable[[], Any], then: Callable[[Any], Any] = lambda answer: None) -> bool:
        """Do something with the ensemble that a loop could do; a refusal ends the sequence, an error is a fault."""
        try:
            then(call())
            return True
        except Mismatch as error:
            self.outcome.fault = Fault("wrong", self.step, str(error), error.size, self.trained)
        except Exception as error:
            if self.allowed and deliberate(error):
                self.outcome.refused.append(f"{self.step}: {brief(error)}")
            else:
                self.outcome.fault = Fault("raised", self.step, f"{brief(error)} at {place(error)}")
        raise Stop

    def loop(self, answer: Callable[[Any], Any]) -> list[Any]:
        """What each member answers; where one raises, the step ends, and so do networks that remember their calls."""
        return self.own(lambda: [answer(member) for member in self.members], Stop if self.stateful else Skip)

    def own(self, work: Callable[[], Any], then: type[BaseException] = Stop) -> Any:
        """The oracle's part of a step; where it raises, a loop could not do it."""
        try:
            with quiet():
                return work()
        except Exception as error:
            self.outcome.invalid.append(f"{self.step}: {brief(error)} at {place(error)}")
            raise then from None

    def call(self, call: Call, how: str = "call", then: Callable[[Any], Any] = lambda answer: None) -> None:
        """Evaluate one call, as an aggregate, as outputs of the members, or with their variance.

        Args:
            call: the arguments.
            how: call, members or variance.
            then: what is done with a right answer, before it is written to.
        """
        args, kwargs = call
        theirs = copied(call)
        expected = self.loop(lambda member: member(*theirs[0], **theirs[1]))
        before = copied(call)
        self.outcome.calls += 1

        def evaluate() -> Any:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                if how == "call":
                    answer = self.ensemble(*args, **kwargs)
                elif how == "members":
                    answer = self.ensemble.member_outputs(*args, **kwargs)
                else:
                    answer = self.ensemble.forward_with_variance(*args, **kwargs)
            self.outcome.warned |= any("fastens" in str(w.message) for w in caught)
            return answer

        def compare(answer: Any) -> None:
            try:
                self.compare(answer, expected, how)
            except Mismatch as error:  # which the network may magnify
                told = isinstance(self.ensemble, fastens.Ensemble)
                told = told and not (self.random or self.stateful or self.trained)
                if not told or error.size > min(SMALL, WITNESS * own_rounding(self.members, before, expected)):
                    raise
            for a, b in zip(pytree.tree_leaves(call), pytree.tree_leaves(before), strict=True):
                if isinstance(a, Tensor) and not torch.equal(a, b):
                    raise Mismatch("an input was modified")
            then(answer)
            if not torch.is_grad_enabled():
                spoil(answer)

        self.attempt(evaluate, compare)

    def compare(self, answer: Any, expected: list[Any], how: str = "call") -> None:
        """Hold an answer against the outputs of the members, but of such as ran away in training."""
        if self.trained and oracle.largest(expected) > RAN_AWAY:
            return
        rule = self.rule if how != "members" else "mean"
        relative = oracle.tolerance(self._rounded(expected), rule)
        if rule == "geometric":  # its shift of 1e-6 magnifies the rounding of scores, which is as large as they are
            relative *= max(1.0, oracle.largest(expected))
        self.remembers_draws |= self.random and self.stateful
        if self.random or self.remembers_draws:
            shapes(answer, oracle.combined(expected, oracle.stacked if how == "members" else oracle.mean), how)
        elif how == "members":
            oracle.check(answer, oracle.combined(expected, oracle.stacked), relative)
        else:
            picked = expected if rule == "dominant" and relative > 1e-6 else None
            wanted = oracle.combined(expected, oracle.RULES[rule])
            if how == "variance":
                oracle.check(answer[1], oracle.combined(expected, oracle.variance), 10 * relative)
                answer = answer[0]
            oracle.check(answer, wanted, relative, picked)

    def _rounded(self, expected: list[Any]) -> torch.dtype:
        if torch.is_autocast_enabled("cpu") and self.dtype == torch.float32:
            return torch.bfloat16
        return self.coarsest

    # Afterwards

    def report(self) -> None:
        """Note how the ensemble is evaluated, as it says itself."""
        report = self.ensemble.report()
        looped = list(report.looped)
        out = self.outcome
        if self.case.engine == "loop":
            out.folded = "asked"
        elif report.engine == "loop" or any(not layer.path for layer in looped):
            out.folded, out.why_looped = "looped", [general(report.why)] + [general(x.why) for x in looped[:1]]
        elif out.folded != "looped" and looped:
            out.folded, out.why_looped = "partly", [general(layer.why) for layer in looped]
        elif out.folded == "unknown":
            out.folded = "wholly"
        out.planned |= bool(report.plans)
        out.why_no_plan = "" if out.planned else general(report.why_no_plan)


def take(
    case: Case, steps: dict[str, Callable[[Run, Random], None]], make: Callable[..., Any] = fastens.Ensemble
) -> Outcome:
    """Run a case to its end or to its first fault."""
    torch.manual_seed(case.network.seed)
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet())
        try:
            run = Run.__new__(Run)
            run.__init__(case, make)
        except Stop:
            return run.outcome
        try:
            for name, seed in case.steps:
                run.step = name
                run.allowed = run.spec.tagged("refusable", True)
                with contextlib.suppress(Skip):
                    steps[name](run, Random(f"step {name} {seed}"))
                run.allowed = False
                if name == "sample":
                    run.report()
        except Stop:
            pass
        finally:
            with contextlib.suppress(Exception):
                run.report()
        return run.outcome


def spoil(answer: Any) -> None:
    """Write to what was returned, as a sampler that clamps in place does."""
    for leaf in pytree.tree_leaves(answer):
        if oracle.is_score(leaf) and not leaf.is_inference():
            leaf.fill_(torch.nan)


def shapes(answer: Any, expected: Any, how: str) -> None:
    """All that can be said of one call whose network draws numbers: structure, shapes, and finite values."""
    answer = answer[0] if how == "variance" else answer
    got, wanted = pytree.tree_flatten(answer), pytree.tree_flatten(expected)
    if got[1] != wanted[1]:
        raise Mismatch(f"structure {got[1]}, expected {wanted[1]}")
    for a, e in zip(got[0], wanted[0], strict=True):
        if isinstance(e, Tensor) and (a.shape != e.shape or a.dtype != e.dtype):
            raise Mismatch(f"{a.dtype} {list(a.shape)}, expected {e.dtype} {list(e.shape)}")
        if oracle.is_score(e) and bool(a.isfinite().all()) != bool(e.isfinite().all()):
            raise Mismatch("not finite, as the loop's is")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def brief(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"


def deliberate(error: BaseException) -> bool:
    """Whether the package raised an error itself, with words of its own."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return "/fastens/" in last.filename and (last.line or "").startswith("raise")


def place(error: BaseException) -> str:
    """Where an error came from: the last line of ours, and the line that raised."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/fastens/" in f.filename] or frames
    return f"{ours[-1].filename.rpartition('/fastens/')[2]}:{ours[-1].lineno} ({frames[-1].name})"


def general(why: str) -> str:
    """A reason without the numbers and names of one network."""
    why = re.sub(r"blocks\.\d+(\.[\w.]+)?", "a block", why.split("\n")[0])
    return re.sub(r"\d+(\.\d+)?(e-?\d+)?", "N", why)[:150]
