"""Ways of a convolution with kernels of tensor descriptors on a GPU, against the library in double on the CPU."""

import pytest
import torch

from fastens.ops._block_ways import CHOICE
from fastens.ops._tma_ways import Call
from fastens.ops.group_moments import group_moments
from fastens.program.block import ConvBlock
from tests.kernels.test_conv2d_on_gpu import on_gpu
from tests.ops.test_tma_ways import CASES, DTYPES, block, in_double
from tests.tolerances import OP, relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SIZES = {  # as a network has them, beside the small ones
    "32x32": dict(members=5, rows=10, channels=256, outputs=256, size=(32, 32), norm=32, groups=32),
    "8x8": dict(members=5, rows=15, channels=256, outputs=384, size=(8, 8), norm=32, groups=32),
    "32x32 to 16x16": dict(members=5, rows=5, channels=128, outputs=256, size=(32, 32), stride=2, groups=32),
    "skip": dict(members=5, rows=5, channels=256, outputs=256, size=(16, 16), skip=128, norm=32, groups=32),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*CASES, *SIZES])
def test_all_ways_that_take_it_agree(name, dtype):
    shape = SIZES[name] if name in SIZES else CASES[name][0]
    call = block(dtype, **shape)
    expected = CHOICE.ways["library"].run(*in_double(call))
    call = Call(ConvBlock.from_flat(on_gpu(call.block.flat())), call.size)
    taken = [way for way in CHOICE.ways if CHOICE.ways[way].refuses(*call) is None]
    if torch.cuda.get_device_capability()[0] in (9, 10):
        assert ("tma 128x128" in taken) is (name in SIZES or CASES[name][1])
    groups, tolerance = shape.get("groups", 0), 2e-3 if dtype == torch.float32 else OP[dtype]  # TF32: 11 bits
    for way in taken:
        spans = -(-expected[0, 0].numel() // 128)
        found = torch.full((len(expected), groups, spans, 2), torch.nan, device="cuda") if groups else None
        y = CHOICE.ways[way].run(*call[:2], None, found)
        assert relative_error(y.cpu(), expected) <= tolerance, way
        if found is not None:
            assert relative_error(found.cpu(), group_moments(y.cpu(), groups, backend="reference")) <= 1e-5, way
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = CHOICE.ways[way].run(*call[:2], None, found)
        graph.replay()
        assert way == "library" or torch.equal(replayed, y), way
