"""Aggregation with guidance, update and variance in one pass."""

import pytest
import torch

from fastens.ops.aggregate_update import aggregate_update
from fastens.reference import aggregate_update as reference
from tests.ops.cases import BACKENDS, KERNELS
from tests.tolerances import OP, relative_error

WHAT = [(), ("x",), ("noise",), ("guidance",), ("x", "noise", "guidance", "variance"), ("variance",)]
RULES = ("mean", "median", "geometric", "alternating")
COUNTS = (1, 5, 18)


def arguments(what, batch=3, dtype=torch.float32):
    shape = (batch, 2, 5)
    tensors = {"x": torch.randn(shape), "noise": torch.randn(shape), "guidance": torch.randn(batch)}
    chosen = {name: tensors[name].to(dtype) for name in what if name in tensors}
    if "x" in what or "noise" in what:
        chosen["coefficients"] = torch.randn(3, batch).to(dtype)
    return chosen | {"variance": "variance" in what}


@pytest.mark.parametrize("backend", BACKENDS[:1] + KERNELS[1:])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("what", WHAT, ids="-".join)
def test_equals_reference(what, rule, backend):
    torch.manual_seed(0)
    options = arguments(what)
    counts = COUNTS
    if backend == "triton" and rule != "alternating":  # the interpreter is slow: one of them each, in turn
        counts = (COUNTS[(WHAT.index(what) + RULES.index(rule)) % len(COUNTS)],)
    for num_members in counts:
        scores = [torch.randn(6 if "guidance" in what else 3, 2, 5) for _ in range(num_members)]
        doubles = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        expected = reference.aggregate_update([s.double() for s in scores], rule, **doubles, seed=3)
        out, variance = aggregate_update(scores, rule, **options, seed=3, backend=backend)
        assert relative_error(out, expected[0]) <= OP[torch.float32]
        if variance is None:
            assert "variance" not in what
        else:
            assert relative_error(variance, expected[1]) <= OP[torch.float32]


@pytest.mark.parametrize("backend", BACKENDS[:1] + KERNELS[1:])
@pytest.mark.parametrize("what", [("guidance",), ("x", "noise", "guidance", "variance")], ids="-".join)
@pytest.mark.parametrize("rows", [2, 4])
def test_guided_rows_with_room_between_them(rows, what, backend):
    torch.manual_seed(0)
    # channels last; a single row of them is dense, several are not
    scores = [torch.randn(2 * rows, 4, 3, 2).movedim(-1, 1)[::2] for _ in range(2)]
    options = {
        name: torch.randn(rows // 2, 2, 4, 3) if name in ("x", "noise") else value
        for name, value in arguments(what, rows // 2).items()
    }
    expected = reference.aggregate_update([s.double() for s in scores], "mean", **options)
    assert expected[0].shape == (rows // 2, 2, 4, 3)
    out, variance = aggregate_update(scores, "mean", **options, backend=backend)
    assert relative_error(out, expected[0]) <= OP[torch.float32]
    assert variance is None or relative_error(variance, expected[1]) <= OP[torch.float32]


@pytest.mark.parametrize("backend", KERNELS[1:])
def test_gradients_and_opcheck(backend):
    options = arguments(("x", "noise", "guidance", "variance"), dtype=torch.double)
    names = ("x", "noise", "coefficients", "guidance")
    scores = [torch.randn(6, 2, 5, dtype=torch.double, requires_grad=True) for _ in range(2)]
    own = [options[name].requires_grad_() for name in names]
    kernel = getattr(torch.ops.fastens, f"_aggregate_update_{backend}").default
    assert torch.autograd.gradcheck(
        lambda a, b, *rest: kernel([a, b], "mean", "", [], 0, 0, *rest, True), [*scores, *own], fast_mode=True
    )
    plain = [t.detach() for t in own]
    call = ([s.detach() for s in scores], "mean", "", [], 0, 0, *plain, True)
    assert set(torch.library.opcheck(kernel, call).values()) == {"SUCCESS"}


def test_bad_input():
    scores = torch.zeros(2, 3, 4)
    for options, message in (
        ({"x": scores[0]}, "without coefficients"),
        ({"guidance": torch.zeros(1)}, "3 rows, expected an even number"),
        ({"coefficients": torch.zeros(3, 2)}, r"coefficients is \[3, 2\], expected \[3, 3\]"),
        ({"rule": "mixture"}, "draws per trajectory"),
    ):
        with pytest.raises(ValueError, match=message):
            aggregate_update(scores, **options)
