"""What every instruction means, at the values where implementations part: by torch's definition, for all of them."""

import itertools
import math

import pytest
import torch

from fastens.ops.pointwise import pointwise
from fastens.ops.run_program import forced_target, targets
from fastens.program.steps import Opcode
from fastens.reference import run_program as reference
from fastens.reference.pointwise import BINARY, NUMBERED, instructed
from tests.ops import test_run_program_pointwise as programs
from tests.ops.cases import BACKENDS

VALUES = [
    *(0.0, -0.0, 1.0, -1.0, 0.25, -0.3, 7.0, -20.0, 88.0, -88.0, -100.0, 104.0, -104.0, 1e4, -1e4),
    *(1e-45, -1e-45, 1e-39, -1e-39, 1.1754944e-38, -1.1754944e-38, 1e-20, -1e-20),
    *(1e19, -1e19, 1e30, -1e30, 3.4028235e38, -3.4028235e38, math.inf, -math.inf, math.nan),
]
NUMBERS = [0.0, 1.0, -2.5, 1e-39, 3e38, math.inf, math.nan]
EXACT = {Opcode.COPY, Opcode.SQUARE, Opcode.ABS, *BINARY, *NUMBERED}  # rounded once, signs of zeros included
# of arguments beyond this, GPUs' sine and cosine say what they like
PERIODIC, MOST = {Opcode.SIN, Opcode.COS}, 1e4


def by_program(target):
    """The way of a target's kernels."""

    def run(x, y, opcode, number):
        with forced_target(target):
            return programs.chain([(opcode, 0, 1, number)], x, y)

    return run


def by_op(backend):
    """The way of a backend of the op."""
    return lambda x, y, opcode, number: pointwise((x, y), [(opcode, 0, 1, number)], backend=backend)


WAYS = [pytest.param(by_program(target), id=f"program-{target}") for target in targets()]
for each in (BACKENDS[0], BACKENDS[-1]):
    name, marks = (each, ()) if isinstance(each, str) else (each.values[0], each.marks)
    WAYS.append(pytest.param(by_op(name), id=f"op-{name}", marks=marks))


@pytest.mark.parametrize("run", WAYS)
@pytest.mark.parametrize("opcode", Opcode, ids=lambda opcode: opcode.name)
def test_means_what_torch_means(opcode, run, request):
    if not_here(request.node.callspec.id):
        pytest.skip("this processor has no such target")
    for number in NUMBERS if opcode in NUMBERED else [0.0]:
        check(opcode, run, number)


@pytest.mark.parametrize("run", WAYS)
@pytest.mark.parametrize("opcode", NUMBERED, ids=lambda opcode: opcode.name)
def test_a_number_may_be_minus_zero(opcode, run, request):
    if not_here(request.node.callspec.id):
        pytest.skip("this processor has no such target")
    if "triton" in request.node.callspec.id:
        request.applymarker(pytest.mark.xfail(strict=True, reason="Triton's `full` drops the sign of a constant zero"))
    check(opcode, run, -0.0)


def check(opcode, run, number):
    values = [v for v in VALUES if opcode not in PERIODIC or not abs(v) > MOST or not math.isfinite(v)]
    pairs = list(itertools.product(values, VALUES)) if opcode in BINARY else [(v, 1.0) for v in values]
    x, y = torch.tensor(pairs).T.contiguous()
    # one by one: torch's own vectors differ from its scalars at the edges
    expected = torch.cat([instructed(opcode, a, b, number) for a, b in zip(x.split(1), y.split(1), strict=True)])
    actual = run(x, y, opcode, number)
    assert torch.equal(actual.isnan(), expected.isnan()), list(zip(x, y, actual, expected, strict=True))
    kept = ~expected.isnan()
    if opcode in EXACT:
        assert torch.equal(actual.view(torch.int32)[kept], expected.view(torch.int32)[kept]), f"number {number}"
        return
    assert torch.equal(actual[expected.isinf()], expected[expected.isinf()])
    finite = expected.isfinite()
    away = (actual.double() - expected.double()).abs()[finite]
    # what is not normal may be 0, but for an exponential, which networks divide by sums of, or take the logarithm of
    least = 3e-45 if opcode is Opcode.EXP else 2e-38
    assert (away <= 1e-6 * expected.double().abs()[finite] + least).all(), x[finite][away.argmax()]


def not_here(name):
    """Whether the processor lacks the target that a test's name has."""
    for target in targets():
        if name.endswith(f"program-{target}"):
            try:
                with forced_target(target):
                    return False
            except RuntimeError:
                return True
    return False


def test_the_reference_of_programs_has_the_same_definition():
    assert reference.instructed is instructed
