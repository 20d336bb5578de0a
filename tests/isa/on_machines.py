"""The kernels of other machines and compilers against the references: ``make test-aarch64``, and not ``make test``.

For aarch64 they are cross-compiled, and run by QEMU; for this machine they are compiled by clang++, where there is one.
"""

import os
import shutil

import numpy as np
import pytest
import torch

from fastens import _build, rules
from fastens.program.steps import DTYPES, Activation, Opcode
from fastens.program.winograd import TILES
from fastens.reference.aggregate import aggregate
from fastens.reference.dropout import dropout
from fastens.reference.forest import combine
from tests.isa.server import ELEMENTS, Server, compiled
from tests.ops import programs
from tests.ops import test_run_program_conv as conv
from tests.ops import test_run_program_masks as masks
from tests.ops import test_run_program_norm as norm
from tests.ops import test_run_program_pointwise as pointwise
from tests.ops import test_run_program_winograd as winograd
from tests.ops.programs import random
from tests.tabular.forests import fitted, rows, stacked
from tests.tolerances import OP, relative_error

MACHINES = {  # compiler, emulator, instruction sets
    "aarch64": ("aarch64-linux-gnu-g++", "qemu-aarch64", ["neon"]),
    "clang++": ("clang++", None, ["avx512_bf16", "avx512", "avx2", "baseline"]),
}
ON = [(machine, name) for machine, (_, _, names) in MACHINES.items() for name in names]


@pytest.fixture(params=ON, ids="-".join, scope="module")
def server(request):
    machine, name = request.param
    cxx, emulator, _ = MACHINES[machine]
    missing = [program for program in (cxx, emulator) if program and not shutil.which(program)]
    if missing and machine == "aarch64":
        pytest.fail(f"no {' and no '.join(missing)}: install g++-aarch64-linux-gnu and qemu-user")
    if missing:
        pytest.skip(f"no {missing[0]}")
    built = compiled(cxx, _build.source_root().parent / "build" / "isa" / machine)
    environment = {**os.environ, "FASTENS_CPU_TARGET": name}
    server = Server([*([emulator] if emulator else []), str(built)], environment)
    yield server
    server.close()


@pytest.fixture
def steps_run(server, monkeypatch):
    """Tests of programs ask the server for what the kernels compute."""
    for module in (programs, pointwise, masks, norm, conv, winograd):
        if hasattr(module, "run_program"):
            monkeypatch.setattr(module, "run_program", server.run_program)
    return server


def test_the_instruction_set_is_named(server, request):
    machine, name = request.node.callspec.params["server"]
    assert server.described().startswith(name)
    assert machine != "aarch64" or server.described() == "neon, the only one for this architecture"


@pytest.mark.parametrize("vectors", [1, 2, 3, 4])
@pytest.mark.parametrize("kernel", [1, 3])
def test_convolutions(steps_run, kernel, vectors):
    for channels, out_channels in ((3, 20), (37, 130)):
        conv.test_joined_and_enlarged_sources((channels, 20), kernel, 2, True)
        shape = {"in_channels": (channels,), "out_channels": out_channels, "kernel": (kernel, kernel)}
        ends = {"row_vector": True, "residual": True, "scale": 0.7, "divisor": 3.0, "act_out": Activation.SILU}
        conv.check(vectors=vectors, band=4, **shape, **ends)
    conv.test_tiles_of_pixels(vectors, 11)
    conv.test_a_bad_row_stays_alone(torch.nan, kernel)


@pytest.mark.parametrize("squares", TILES)
def test_convolutions_in_squares(steps_run, squares):
    for channels, out_channels, vectors in ((3, 20, 1), (37, 130, 3), (64, 64, 4)):
        winograd.test_joined_and_enlarged_sources(squares, (channels, 20), 2, True)
        shape = {"in_channels": (channels,), "out_channels": out_channels, "vectors": vectors, "size": (7, 9)}
        conv.check(squares=squares, band=4, row_vector=True, residual=True, act_out=Activation.SILU, **shape)
    winograd.test_members_and_rows(squares, 5, 2)


@pytest.mark.parametrize("activation", Activation)
def test_activations_of_convolutions(steps_run, activation):
    conv.check(act_in=activation, tables=True)
    conv.check(act_out=activation, stride=(2, 2))


def test_masks(steps_run):
    for layout in masks.LAYOUTS:
        for pixels, channels in ((64, 32), (49, 20), (1, 37), (16, 130)):
            masks.test_drawn_words_are_those_of_the_op(layout, pixels, channels, 0.3)
    masks.test_masks_of_convolutions((True, True), (16, 21))
    masks.test_a_mask_by_itself((37,), Activation.SILU)


def test_normalisation_and_attention(steps_run):
    for channels, groups in ((3, 1), (40, 8), (130, 10)):
        norm.check_norm([random(4, channels, 3, 5)], groups)
        norm.check_layer_norm(random(4, 3, channels))
    norm.check_norm([random(4, 17, 3, 5), random(4, 20, 3, 5, seed=1)], 37, splits=2)
    norm.test_attention(17, 37, 20, 13)
    norm.test_attention_with_large_logits(1e3)


@pytest.mark.parametrize("opcode", Opcode, ids=lambda opcode: opcode.name)
def test_instructions(steps_run, opcode):
    pointwise.check_instruction(opcode)


def test_chains_and_dtypes(steps_run):
    pointwise.test_longest_chain_of_all_inputs(3, 2)
    pointwise.test_six_dimensions_broadcast_into_a_slice(7)
    for opcode in (*pointwise.BINARY, *pointwise.NUMBERED, Opcode.SQRT, Opcode.SQUARE):
        pointwise.test_arithmetic_is_that_of_ieee(opcode)
    for source in DTYPES:
        for other in DTYPES:
            pointwise.test_dtypes(source, other, 3)


RULES = [
    (0, rules.Mean()), (0, rules.Sum()), (1, rules.Median()), (1, rules.Median("lower")), (2, rules.Dominant()),
    (3, rules.MaxAbs()), (4, rules.Geometric("batch")),
]  # fmt: skip


@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
@pytest.mark.parametrize(("number", "rule"), RULES, ids=str)
def test_rules(server, number, rule, dtype):
    generator = torch.Generator().manual_seed(0)
    for num_members in (1, 2, 3, 5, 8, 9, 16, 17, 33):
        scores = [torch.randn(3, 301, generator=generator).to(dtype) for _ in range(num_members)]
        given = {"scale": 1 / num_members if rule == rules.Mean() else 1.0, "eps": rules.Geometric().eps}
        actual = server.aggregate(number, scores, average=rule.option != "lower", **given)
        expected = aggregate(torch.stack(scores).double(), rule)
        assert relative_error(actual, expected) <= OP[dtype]
        if num_members > 1 and number < 4:
            scores[1][2, 7] = torch.nan
            isnan = server.aggregate(number, scores, average=rule.option != "lower", **given).isnan()
            assert isnan.nonzero().tolist() == [[2, 7]]


@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
def test_variance(server, dtype):
    scores = [random(3, 301, seed=k).to(dtype) for k in range(5)]
    expected = torch.stack(scores).double().var(0, correction=0)
    assert relative_error(server.aggregate(5, scores), expected) <= OP[dtype]


@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
@pytest.mark.parametrize("activation", Activation)
def test_dropout(server, dtype, activation):
    x, members, samples = random(3, 5, 67).to(dtype), torch.tensor([0, 4, 4]), torch.tensor([5, 0, 2**31])
    actual = server.dropout(x, members, samples, 0.3, -5, 2**31 + 7, int(activation))
    expected = dropout(x.double(), members, samples, 0.3, -5, 2**31 + 7, activation.name.lower())
    assert torch.equal(actual == 0, expected == 0)
    assert relative_error(actual, expected) <= OP[dtype]


def test_halves_are_rounded_as_by_torch(server):
    """Every half, and floats on both sides of where the rounding turns, to the bit."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16)
    bits = torch.randint(-(2**31), 2**31, (20000,), generator=torch.Generator().manual_seed(0)).int()
    for dtype in (torch.float16, torch.bfloat16):
        ends = every.view(dtype)
        same = server.aggregate(0, [ends])
        assert torch.equal(same.isnan(), ends.isnan())
        assert torch.equal(
            same.view(torch.int16)[~ends.isnan()], (ends.float() * 1.0).to(dtype).view(torch.int16)[~ends.isnan()]
        )
        # sums of two are floats that lie between
        pairs = [part.view(dtype) for part in bits.view(torch.int16).reshape(2, -1)]
        expected = (pairs[0].float() + pairs[1].float()).to(dtype)
        actual = server.aggregate(0, pairs)
        assert torch.equal(actual.isnan(), expected.isnan())
        assert torch.equal(actual.view(torch.int16)[~expected.isnan()], expected.view(torch.int16)[~expected.isnan()])


@pytest.mark.parametrize("rule", ["mean", "sum", "median", rules.Median("lower"), "dominant", "max_abs"], ids=str)
@pytest.mark.parametrize("depth", [3, 7, None])
def test_forests_equal_the_loop_over_trees(server, depth, rule):
    import fastens

    for outputs, n in ((1, 300), (3, 33), (6, 1), (3, 300)):
        source, x = fitted(outputs=outputs, depth=depth), rows(n=n)
        forest = fastens.Forest.from_sklearn(source)
        actual = server.predict(forest.trees, forest._double_inputs, x, rules.get(rule))
        assert np.array_equal(actual, combine(stacked(source, x), rules.get(rule)))


def test_geometric_means_of_forests(server):
    import fastens

    source, x = fitted(), rows()
    forest = fastens.Forest.from_sklearn(source)
    actual = server.predict(forest.trees, forest._double_inputs, x, rules.Geometric())
    expected = combine(stacked(source, x), rules.Geometric())
    assert np.abs(actual - expected).max() <= 1e-12 * np.abs(expected).max()
