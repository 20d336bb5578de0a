"""Random graphs of operations on tensors of any rank and stride: ``python -m tests.fuzz.graphs 0 1000``.

The other networks of this suite are made of blocks, each sound by itself. Here single operations follow one another as
they may, on what earlier ones left: broadcast from any side, cut with room between rows, turned, joined, written to in
place after others have read it. What plans assume of images, lines and memory is what such graphs do not grant.
"""

import copy
import warnings
from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

import fastens
from tests.fuzz import oracle
from tests.fuzz.operations import OFTEN, OPS, Op
from tests.fuzz.tally import print_tally

CALLS, MOST, DRAWS = 3, 4096, 60
AROUND = 20  # how many times a member's own rounding an answer may be from it


def rounded(x: Tensor) -> Tensor:
    """Another rounding of it."""
    noise = torch.randint(-3, 4, x.shape, generator=torch.Generator().manual_seed(x.numel()))
    return x * (1 + noise * torch.finfo(x.dtype).eps)


class Graph(nn.Module):
    """What is drawn, one operation after the other, for inputs of some shapes.

    Args:
        seed: of what is drawn.
        inputs: of those shapes.

    Attributes:
        rounds: whether each operation is rounded otherwise.
    """

    rounds = False

    def __init__(self, seed: int, inputs: list[Tensor]) -> None:
        super().__init__()
        draw = Random(f"graph {seed}")
        self.weights, self.names, self.steps = nn.ParameterDict(), list[str](), list[tuple[str, Op]]()
        self.pool = list(inputs)
        for _ in range(draw.randint(2, 12)):
            for _ in range(DRAWS):
                name = draw.choices(list(OPS), [OFTEN.get(each, 1) for each in OPS])[0]
                made, kept = len(self.weights), [x.clone() for x in self.pool]
                try:
                    step = OPS[name](self, draw)
                    with torch.no_grad():
                        found = step(self.pool, self.weights)
                    if not 0 < found.numel() <= MOST or found.dtype != torch.float32 or not found.isfinite().all():
                        raise ValueError(name)
                    if found.abs().max() > 1e3:
                        raise ValueError(name)
                except (RuntimeError, ValueError, IndexError, NotImplementedError):  # not of these shapes
                    self.pool = kept
                    for last in list(self.weights)[made:]:
                        del self.weights[last]
                    continue
                self.steps.append((name, step))
                self.pool.append(found)
                break
        self.returned = sorted(
            {len(self.pool) - 1, *(draw.randrange(len(self.pool)) for _ in range(draw.randint(0, 2)))}
        )
        self.pool = []

    def weight(self, *shape: int) -> str:
        """Make a parameter; its name."""
        name = f"w{len(self.weights)}"
        self.weights[name] = nn.Parameter(torch.randn(shape) * 0.5)
        return name

    def forward(self, *inputs: Tensor) -> Any:
        """All operations, and some of the tensors that they left."""
        pool = list(inputs)
        for name, step in self.steps:
            found = step(pool, self.weights)
            pool.append(rounded(found) if self.rounds and name != "write" else found)
        found = tuple(pool[i] for i in self.returned)
        return found if len(found) > 1 else found[0]


def made(seed: int) -> tuple[list[Graph], list[list[Tensor]]]:
    """Members of one graph, and the arguments of some calls."""
    draw, generator = Random(f"inputs {seed}"), torch.Generator().manual_seed(seed)
    rows, width = draw.choice([1, 2, 3, 4]), draw.choice([1, 3, 4, 6, 8])
    images = [[width, 4, 4], [4, 4, 4], [3, 3, 3], [width, 5, 3], [width, 8, 8], [1, 6, 6], [8, 8, 8]]
    shape = draw.choice(
        images if draw.random() < 0.6 else [[width], [5, width], [width, width], [2, 3, width], [width, 8]]
    )
    last = draw.random() < 0.3

    def inputs() -> list[Tensor]:
        x = torch.randn(rows, *shape, generator=generator)
        x = x.to(memory_format=torch.channels_last) if last and x.ndim == 4 else x
        return [x, torch.rand(rows, generator=generator)]

    first = Graph(seed, inputs())
    members = [first, *(copy.deepcopy(first) for _ in range(draw.choice([1, 2])))]
    with torch.no_grad():
        for member in members:
            for p in member.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.5)
    return members, [inputs() for _ in range(CALLS)]


def outcome(seed: int, make: Callable[..., Any] = fastens.Ensemble) -> str:
    """What became of a graph: how an ensemble, or what ``make`` makes, evaluated it, or that its members do not run.

    Raises:
        AssertionError: an answer was not the loop's, or there was none.
    """
    members, calls = made(seed)
    where = f"seed {seed}: {[name for name, _ in members[0].steps]}"
    wide, others = ([copy.deepcopy(member) for member in members] for _ in range(2))
    for member, other in zip(wide, others, strict=True):
        member.double()
        other.rounds = True
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that members are looped
        ensemble = make(copy.deepcopy(members))
        for number, call in enumerate(calls):
            try:
                outputs, roundings = ([m(*copied(call)) for m in each] for each in (members, others))
            except RuntimeError:
                return "no call of a member"  # such as to write where it lies twice
            exact = [member(*copied([x.double() for x in call])) for member in wide]
            try:
                answer = ensemble(*copied(call))
            except Exception as error:
                raise AssertionError(f"{type(error).__name__}: {error} in call {number}, {where}") from error
            check(answer, outputs, roundings, exact, f"call {number}, {where}")
    report = ensemble.report()
    return f"{report.engine}, {'planned' if report.plans else 'no plan'}"


def copied(call: list[Tensor]) -> list[Tensor]:
    return [x.clone() for x in call]


def check(answer: Any, outputs: list[Any], roundings: list[Any], exact: list[Any], where: str) -> None:
    """Raise unless an answer is the members' mean, as near as their own rounding, or another, is to what is exact."""
    ours = [answer] if isinstance(answer, Tensor) else list(answer)
    for i in range(len(outputs[0]) if isinstance(outputs[0], tuple) else 1):
        each, other, real = (
            torch.stack([x[i] if isinstance(x, tuple) else x for x in found]) for found in (outputs, roundings, exact)
        )
        assert (ours[i].shape, ours[i].dtype) == (each[0].shape, each.dtype), f"output {i} in {where}"
        wanted, scale = each.double().mean(0), max(float(each.abs().max()), oracle.FLOOR)
        own = float(torch.maximum((each - real).abs(), (other - real).abs()).max()) / scale
        off = float((ours[i] - wanted).abs().max()) / scale
        assert off <= oracle.tolerance(torch.float32) + AROUND * own, (
            f"output {i} is {off:.1e} off ({own:.1e}) in {where}"
        )


if __name__ == "__main__":
    print_tally(outcome, "fault")
