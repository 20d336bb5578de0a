"""An ensemble of a network against a plain loop over copies of its members, over calls with other inputs."""

import copy
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import fastens
from tests.atlas.registry import Given, Network, arguments
from tests.networks import Arguments, randomised

# Batch and seed of the inputs. Of each signature the second call runs on a plan, where there is one, with other inputs
# than it was recorded with. The last ones have the time as a Python number, where the class takes that.
CALLS = [(2, 0), (2, 1), (2, 2)]
LAST = [(1, 3), (1, 4)]


@dataclass
class Found:
    """What came of a comparison.

    Attributes:
        errors: the largest difference of each call, relative to the largest magnitude.
        gradient_errors: likewise of the parameters' gradients.
        engine: ``fold`` or ``loop``, and why.
        why: the reason for the engine.
        slices: functions that ran member by member, with how often they did.
        functions: torch functions that one member calls.
        plans: plans that were made.
        why_no_plan: why there is none for the last signature.
        warned: what was warned about.
    """

    errors: list[float] = field(default_factory=list)
    gradient_errors: list[float] = field(default_factory=list)
    engine: str = ""
    why: str = ""
    slices: dict[str, int] = field(default_factory=dict)
    functions: int = 0
    plans: int = 0
    why_no_plan: str = ""
    warned: list[str] = field(default_factory=list)

    @property
    def folded(self) -> float:
        """Percentage of a member's torch functions that run once for all members."""
        return 0.0 if self.engine != "fold" else 100 * (1 - sum(self.slices.values()) / max(1, self.functions))


class Counting(TorchFunctionMode):
    """Counts torch functions, properties and sizes apart."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[getattr(func, "__name__", "")] += getattr(func, "__name__", "") not in ("__get__", "dim", "size")
        return func(*args, **kwargs or {})


def members_of(make: Any, count: int) -> list[nn.Module]:
    """Networks with every parameter random."""
    return [randomised(make, seed) for seed in range(count)]


def tensors(output: Any) -> list[Tensor]:
    """The tensors of an output, in order."""
    return [x for x in pytree.tree_leaves(dict(output) if isinstance(output, dict) else output) if torch.is_tensor(x)]


def looped(members: list[nn.Module], call: Arguments) -> list[Tensor]:
    """Means of the members' outputs; of what is no floating-point tensor, the first member's."""
    args, kwargs = call
    columns = zip(*(tensors(member(*args, **kwargs)) for member in members), strict=True)
    return [torch.stack(column).mean(0) if column[0].is_floating_point() else column[0] for column in columns]


def error(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference, relative to the largest magnitude of the tensor."""
    assert len(ours) == len(theirs)
    assert [x.shape for x in ours] == [x.shape for x in theirs]
    apart = [
        float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-30))
        for a, b in zip(ours, theirs, strict=True)
        if b.numel()
    ]
    return max(apart, default=0.0)


def calls_of(entry: Network, given: Given) -> list[Arguments]:
    """Arguments of each call."""
    first = [arguments(given, batch, seed) for batch, seed in CALLS]
    return first + [arguments(given, batch, seed, entry.number) for batch, seed in LAST]


def compare(entry: Network, num_members: int = 2, gradients: bool = True) -> Found:
    """Hold a network's ensemble against the loop."""
    make, given = entry.build()
    members = members_of(make, num_members)
    copies = copy.deepcopy(members) if entry.own_copies else members
    found = Found()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ensemble = fastens.Ensemble(members)
        with torch.no_grad():
            for args, kwargs in calls_of(entry, given):
                expected = looped(copies, copy.deepcopy((args, kwargs)))
                assert all(x.isfinite().all() for x in expected)
                found.errors.append(error(tensors(ensemble(*args, **kwargs)), expected))
        planned = ensemble.report()
        if gradients:
            for seed in (8, 9):  # the first call of a signature may return what the members gave
                found.gradient_errors.append(gradient_error(ensemble, copies, arguments(given, 2, seed)))
    report = ensemble.report()  # gradients may have taken the loop
    found.warned = [str(w.message) for w in caught if "fastens" in str(w.message)]
    found.engine, found.why, found.slices = report.engine, report.why, report.slices
    found.plans, found.why_no_plan = len(planned.plans), planned.why_no_plan
    with torch.no_grad(), Counting() as counting:
        args, kwargs = arguments(given, 2, 0)
        copies[0](*args, **kwargs)
    found.functions = sum(counting.calls.values())
    return found


def gradient_error(ensemble: fastens.Ensemble, copies: list[nn.Module], call: Arguments) -> float:
    """The largest difference of a parameter's gradient, relative to its largest gradient.

    Or, where a parameter's are small, to a thousandth of the network's largest: sums that cancel are rounding alone.
    """
    args, kwargs = call
    for module in (ensemble, *copies):
        module.zero_grad()
    sum(x.square().sum() for x in tensors(ensemble(*args, **kwargs)) if x.requires_grad).backward()  # pyright: ignore
    sum(x.square().sum() for x in looped(copies, (args, kwargs)) if x.requires_grad).backward()  # pyright: ignore
    ours = {name: p.grad for name, p in ensemble.network.named_parameters()}
    theirs = [{name: p.grad for name, p in member.named_parameters()} for member in copies]
    largest = max(float(g.abs().max()) for own in theirs for g in own.values() if g is not None)
    worst = 0.0
    for name in theirs[0]:
        for k, own in enumerate(theirs):
            want, stack = own[name], ours.get(name)
            got = ours.get(f"{k}.{name}") if stack is None else stack[k]
            if want is None or got is None:
                assert want is None or not want.any(), name
                assert got is None or not got.any(), name
                continue
            assert want.isfinite().all(), name
            apart, scale = float((got - want).abs().max()), float(want.abs().max())
            assert apart == apart, name
            worst = max(worst, apart / max(scale, largest / 1000))
    return worst
