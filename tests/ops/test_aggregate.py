"""The public function: what it takes, what it refuses, which backend it takes."""

import pytest
import torch

import fastens
from fastens import _native, rules
from tests.tolerances import OP, relative_error


@pytest.mark.parametrize("rule", [*rules.names()[:-1], *(a for a, n in rules.ALIASES.items() if n != "mixture")])
def test_stack_and_list_and_default_backend_agree(rule):
    stack = torch.randn(5, 3, 2, 4)
    for dtype in (torch.float32, torch.bfloat16):
        scores = stack.to(dtype)
        results = [
            fastens.aggregate(given, rule, backend=backend, generator=torch.Generator().manual_seed(1))
            for given in (scores, list(scores), tuple(scores))
            for backend in ("auto", "reference")
        ]
        for result in results:
            assert result.shape == (3, 2, 4)
            assert relative_error(result, results[1]) <= OP[dtype]


# Not those that read a generator; the compiler sees one op with another name of its rule.
@pytest.mark.parametrize(
    "rule", [pytest.param(name, marks=pytest.mark.full if i % 2 else ()) for i, name in enumerate(rules.names()[:-2])]
)
def test_compiles_whole_with_gradients(rule):
    scores = [torch.randn(3, 4, requires_grad=True) for _ in range(5)]
    torch.compiler.reset()

    def call(scores):
        return fastens.aggregate(scores, rule, generator=None)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    ours = torch.autograd.grad(compiled(scores).square().sum(), scores)
    theirs = torch.autograd.grad(call(scores).square().sum(), scores)
    for a, b in zip(ours, theirs, strict=True):
        assert relative_error(a, b) <= OP[torch.float32]
    with torch.no_grad():
        assert relative_error(compiled(scores), call(scores)) <= OP[torch.float32]


def test_forward_mode_derivative():
    scores, tangent = torch.randn(3, 4, 5, dtype=torch.double), torch.randn(3, 4, 5, dtype=torch.double)
    _, ours = torch.func.jvp(lambda x: fastens.aggregate(x, "geometric"), (scores,), (tangent,))
    step = 1e-6
    both = [fastens.aggregate(scores + s * step * tangent, "geometric") for s in (1, -1)]
    assert relative_error(ours, (both[0] - both[1]) / (2 * step)) < 1e-6


def test_weights():
    scores = torch.randn(3, 2, 4)
    expected = (scores * torch.tensor([0.5, 0.3, 0.2]).view(3, 1, 1)).sum(0)
    for result in (
        fastens.aggregate(scores, weights=[0.5, 0.3, 0.2]),
        fastens.aggregate(scores, rules.Mean((0.5, 0.3, 0.2))),
    ):
        assert relative_error(result, expected) <= OP[torch.float32]


@pytest.mark.parametrize("num_members", [1, 2, 3])
def test_result_is_a_new_tensor(num_members):
    scores = [torch.randn(2, 3) for _ in range(num_members)]
    for rule in rules.names()[:-1]:
        result = fastens.aggregate(scores, rule)
        before = [x.clone() for x in scores]
        result.add_(1)
        assert all(torch.equal(a, b) for a, b in zip(scores, before, strict=True))


def test_alternating_is_reproducible_and_fair():
    scores = torch.arange(4.0).view(4, 1).expand(4, 4000)
    draws = [fastens.aggregate(scores, "alternating", generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    counts = draws[0].long().bincount(minlength=4)
    assert (counts - 1000).abs().max() < 110  # four standard deviations
    torch.manual_seed(7)
    first = fastens.aggregate(scores, "alternating")
    torch.manual_seed(7)
    assert torch.equal(first, fastens.aggregate(scores, "alternating"))


S = torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((S, "meen"), ValueError, "did you mean 'mean'"),
        ((S, 3), TypeError, "expected a name or a value"),
        ((S, rules.Mean), TypeError, "call it to make a value"),
        ((S, "mixture"), ValueError, "with ens.trajectory"),
        ((torch.zeros(0, 3, 4),), ValueError, "no members"),
        (([],), ValueError, "no members"),
        ((torch.zeros(3),), ValueError, "expected \\[K, B, ...\\]"),
        (([torch.tensor(1.0)],), ValueError, "0-dimensional"),
        ((S.long(),), TypeError, "torch.int64, expected a floating-point"),
        ((S > 0,), TypeError, "torch.bool, expected a floating-point"),
        ((None,), TypeError, "scores is a NoneType"),
        (([1.0, 2.0],), TypeError, "scores\\[0\\] is a float"),
        (([S[0], None],), TypeError, "scores\\[1\\] is a NoneType"),
        (([S[0], S[0, :2]],), ValueError, "scores\\[1\\] has shape"),
        (([S[0], S[0].double()],), ValueError, "scores\\[1\\] has dtype"),
        (([S[0], S[0].to("meta")],), ValueError, "scores\\[1\\] has device"),
    ],
)
def test_bad_scores_and_rules(arguments, error, message):
    with pytest.raises(error, match=message):
        fastens.aggregate(*arguments)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weights": [1.0]}, ValueError, "one weight per member, 2, got 1"),
        ({"weights": [0.5, 0.6]}, ValueError, "sum of 1"),
        ({"weights": [0.5, torch.nan]}, ValueError, "finite"),
        ({"weights": "ab"}, TypeError, "sequence of numbers"),
        ({"weights": [0.5, 0.5], "rule": "median"}, ValueError, "takes none"),
        ({"weights": [0.5, 0.5], "rule": rules.Mean((0.5, 0.5))}, ValueError, "has its own"),
        ({"backend": "cuda"}, ValueError, "unknown backend 'cuda'"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        fastens.aggregate(S, **options)


def test_native_missing_names_the_causes(monkeypatch):
    from fastens.ops import _dispatch

    monkeypatch.setattr(_native, "load", lambda device: False)
    monkeypatch.setattr(_native, "status", lambda device: "no libfastens_cpu.so; no C++ compiler")
    _dispatch._choice.cache_clear()
    try:
        with pytest.raises(RuntimeError, match=r"not loaded: no libfastens_cpu.so; no C\+\+ compiler"):
            fastens.aggregate(S, backend="native")
        assert torch.equal(fastens.aggregate(S), S[0])  # auto falls back
    finally:
        _dispatch._choice.cache_clear()


def test_triton_needs_cuda_tensors_outside_its_interpreter(monkeypatch):
    from fastens.ops import _dispatch

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    _dispatch._choice.cache_clear()
    try:
        with pytest.raises(RuntimeError, match=r"serve CUDA tensors, and these are on cpu|triton is not installed"):
            fastens.aggregate(S, backend="triton")
    finally:
        _dispatch._choice.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn])
def test_dtype_without_kernel(dtype):
    with pytest.raises(RuntimeError, match="its kernel takes"):
        fastens.aggregate(S.to(dtype), backend="native")
