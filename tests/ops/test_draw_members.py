"""Counter-based draws: known answers, independence of the batch, agreement of backends."""

import pytest
import torch

from fastens import _native
from fastens.ops.draw_members import draw_members

needs_native = pytest.mark.skipif(not _native.load(), reason=f"no compiled library: {_native.status()}")
BACKENDS = ["reference", pytest.param("native", marks=needs_native)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_known_answer_of_philox(backend):
    # Random123's kat_vectors, philox4x32-10: counter 0, key 0 -> first word 0x6627e8d5. With K = 2**31 - 1 members the
    # draw is floor(word * K / 2**32).
    members = 2**31 - 1
    assert draw_members(0, 0, members, 1, backend=backend).item() == 0x6627E8D5 * members >> 32


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**63 - 1, -5])
@pytest.mark.parametrize("num_members", [1, 2, 5, 1000])
@needs_native
def test_backends_agree(seed, num_members):
    for offset in (0, 7, 2**40):
        ours, reference = (draw_members(seed, offset, num_members, 257, backend=b) for b in ("native", "reference"))
        assert torch.equal(ours, reference)
        assert ours.min() >= 0
        assert ours.max() < num_members


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sample_does_not_depend_on_its_batch(backend):
    assert torch.equal(draw_members(3, 1, 5, 10, backend=backend), draw_members(3, 1, 5, 100, backend=backend)[:10])
    assert draw_members(3, 1, 5, 0, backend=backend).shape == (0,)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    operator = torch.ops.fastens._draw_members_native if backend == "native" else torch.ops.fastens.draw_members
    assert set(torch.library.opcheck(operator.default, (1, 2, 5, 10)).values()) == {"SUCCESS"}


@pytest.mark.parametrize(("num_members", "batch"), [(0, 3), (-1, 3), (2**31, 3), (2, -1)])
def test_bad_input(num_members, batch):
    with pytest.raises(ValueError, match="expected 1 to"):
        draw_members(0, 0, num_members, batch)
