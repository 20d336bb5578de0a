"""Every kind of step, and a whole network, on each instruction set that this machine has."""

import os

import pytest
import torch

import fastens
from fastens import _native
from fastens.ops.run_program import available, forced_target, target, targets
from fastens.program import steps
from fastens.program.steps import Activation, Opcode
from fastens.program.winograd import TILES
from tests.fresh import python
from tests.networks import NETWORKS, randomised, tensor_of
from tests.ops import test_run_program_conv as conv
from tests.ops import test_run_program_masks as masks
from tests.ops import test_run_program_norm as norm
from tests.ops import test_run_program_pointwise as pointwise
from tests.ops import test_run_program_winograd as winograd
from tests.ops.programs import random
from tests.tolerances import NETWORK, relative_error

pytestmark = pytest.mark.skipif(not available(), reason=f"no compiled library: {_native.status()}")


@pytest.fixture(params=targets())
def on_target(request):
    try:
        with forced_target(request.param):
            yield request.param
    except RuntimeError as error:
        if "this processor has no" not in str(error):
            raise
        pytest.skip(str(error).partition("\n")[0])


def test_the_best_target_serves():
    """What the processor has, it uses, and a machine with AVX-512 tests more than its own target."""
    if "FASTENS_CPU_TARGET" not in os.environ:
        capability = torch.backends.cpu.get_cpu_capability()
        assert target().startswith({"AVX512": "avx512", "AVX2": "avx2"}.get(capability, "baseline"))
    assert (target() == "avx512_bf16") <= torch.cpu._is_avx512_bf16_supported()


@pytest.mark.parametrize("vectors", [1, 2, 3, 4])
@pytest.mark.parametrize("kernel", [1, 3])
def test_convolutions(on_target, kernel, vectors):
    for channels, out_channels in ((3, 20), (37, 130), (64, 64)):
        conv.test_joined_and_enlarged_sources((channels, 20), kernel, 2, True)
        conv.check(
            in_channels=(channels,),
            out_channels=out_channels,
            kernel=(kernel, kernel),
            vectors=vectors,
            row_vector=True,
            residual=True,
            scale=0.7,
            divisor=3.0,
            act_out=Activation.SILU,
            band=4,
            num_threads=2,
        )
    conv.test_tiles_of_pixels(vectors, 11)
    conv.test_a_bad_row_stays_alone(torch.nan, kernel)


@pytest.mark.parametrize("squares", TILES)
def test_convolutions_in_squares(on_target, squares):
    for channels, out_channels, vectors in ((3, 20, 1), (37, 130, 3), (64, 64, 4)):
        winograd.test_joined_and_enlarged_sources(squares, (channels, 20), 2, True)
        shape = {"in_channels": (channels,), "out_channels": out_channels, "vectors": vectors, "size": (7, 9)}
        ends = {"row_vector": True, "residual": True, "scale": 0.7, "act_out": Activation.SILU}
        conv.check(squares=squares, band=4, num_threads=2, **shape, **ends)
    winograd.test_members_and_rows(squares, 5, 2)
    winograd.test_a_bad_row_stays_alone(squares, torch.nan)


@pytest.mark.parametrize("activation", Activation)
def test_activations_of_convolutions(on_target, activation):
    conv.check(act_in=activation, tables=True)
    conv.check(act_out=activation, stride=(2, 2))


def test_bfloat16_is_multiplied_where_it_can_be(on_target):
    if on_target == "avx512_bf16":
        conv.check(bfloat16=True, in_channels=(40,), out_channels=70)
    else:
        with pytest.raises(RuntimeError, match=f"multiplies bfloat16, which the target {on_target} does not"):
            conv.check(bfloat16=True, in_channels=(40,), out_channels=70)


def test_dropout(on_target):
    for layout in masks.LAYOUTS:
        for pixels, channels in ((64, 32), (49, 20), (1, 37), (16, 130)):
            masks.test_drawn_words_are_those_of_the_op(layout, pixels, channels, 0.3)
    masks.test_masks_of_convolutions((True, True), (16, 21))
    masks.test_a_mask_by_itself((37,), Activation.SILU)
    masks.test_a_mask_does_not_hide_a_bad_row(torch.nan)


def test_normalisation(on_target):
    for channels, groups in ((3, 1), (40, 8), (130, 10), (320, 32)):
        norm.check_norm([random(4, channels, 3, 5)], groups, num_threads=2)
        norm.check_layer_norm(random(4, 3, channels))
    norm.check_norm([random(4, 17, 3, 5), random(4, 20, 3, 5, seed=1)], 37, splits=2)
    norm.test_norm_of_values_far_from_zero((16, 16), 64)
    norm.test_layer_norm_of_values_far_from_zero(768)
    norm.test_a_bad_row_of_a_norm_stays_alone(torch.inf)


def test_attention(on_target):
    norm.test_attention(17, 37, 20, 13)
    norm.test_attention(256, 64, 130, 13)
    norm.test_attention_with_large_logits(1e3)
    norm.test_a_bad_query_or_row_of_attention_stays_alone(torch.nan)


@pytest.mark.parametrize("opcode", Opcode, ids=lambda opcode: opcode.name)
def test_instructions(on_target, opcode):
    pointwise.check_instruction(opcode)


def test_chains_and_dtypes(on_target):
    pointwise.test_longest_chain_of_all_inputs(3, 2)
    pointwise.test_six_dimensions_broadcast_into_a_slice(7)
    pointwise.test_tanh_keeps_its_relative_error()
    pointwise.test_exponential_is_within_two_units_in_the_last_place()
    for opcode in (*pointwise.BINARY, *pointwise.NUMBERED, Opcode.SQRT, Opcode.SQUARE):
        pointwise.test_arithmetic_is_that_of_ieee(opcode)
    for opcode in (Opcode.EXP, Opcode.LOG, Opcode.SIN, Opcode.COS):
        pointwise.test_what_embeds_a_time_is_within_two_units_of_torch(opcode)
    for source in steps.DTYPES:
        for other in steps.DTYPES:
            pointwise.test_dtypes(source, other, 3)
    pointwise.test_bfloat16_keeps_nan_and_infinities()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_network(on_target, dtype):
    make, arguments = NETWORKS["unet_2d_attention"]
    members = [randomised(make, seed).to(dtype) for seed in range(2)]
    ensemble = fastens.Ensemble(members, engine="fold")
    (x, t), kwargs = arguments(3)
    with torch.no_grad():
        wide = [member.float()(x.to(dtype).float(), t, **kwargs) for member in members]
        expected = torch.stack([tensor_of(output) for output in wide])
        for _ in range(2):
            output = tensor_of(ensemble.member_outputs(x.to(dtype), t, **kwargs))
            error = relative_error(output.float(), expected)
            assert error < (NETWORK[torch.float32] if dtype == torch.float32 else 5e-2)
    assert ensemble.report().plans


def run_with_target(name):
    code = "from fastens.ops.run_program import available, target; available(); print(target())"
    return python(code, FASTENS_CPU_TARGET=name)


def test_the_environment_chooses():
    assert run_with_target("baseline").stdout.strip() == "baseline"


def test_a_target_that_is_not_there_is_refused():
    result = run_with_target("avx1024")
    assert result.returncode != 0
    assert "FASTENS_CPU_TARGET: 'avx1024' is no target of this build, which has" in result.stderr
