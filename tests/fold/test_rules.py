"""Every function of torch's own catalogue gives all members what it gives each: by its rule, or entry by entry."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.utils._pytree as pytree

import fastens  # noqa: F401  (registers the rules)
from fastens.fold.dispatch import Fold
from fastens.fold.tensor import MemberTensor, NotFoldable, all_members
from tests.fold.contract import Held, batch

op_db = pytest.importorskip("torch.testing._internal.common_methods_invocations").op_db

K = 3
# They draw random numbers, look at memory, leave it unset, or are no functions of a network.
_LEFT_OUT = """
    cauchy exponential geometric log_normal normal uniform rand_like randn_like randint_like bernoulli multinomial
    svd_lowrank pca_lowrank empty_like new_empty new_empty_strided empty empty_strided empty_permuted
    as_strided as_strided_copy as_strided_scatter nn.functional.rrelu nn.functional.fractional_max_pool2d
    nn.functional.fractional_max_pool3d nn.functional.dropout nn.functional.dropout2d nn.functional.dropout3d
    nn.functional.alpha_dropout nn.functional.feature_alpha_dropout nn.functional.scaled_dot_product_attention
    nn.functional.multi_head_attention_forward torch._scaled_mm torch._scaled_mm_v2 addbmm randn randint
    native_dropout_backward nn.functional.gumbel_softmax
""".split()
NAMES = sorted(
    {
        op.name
        for op in op_db
        if op.name not in _LEFT_OUT and not op.name.startswith(("sparse", "masked.", "to_sparse", "jiterator", "ops."))
    }
)


def another(x, k):
    """The value of member k."""
    if x.dtype in (torch.float32, torch.float64, torch.complex64):
        return x.clone() * (1 + 0.05 * k)
    if x.dtype == torch.bool or x.numel() < 2:
        return x.clone()
    return x.clone().flatten().roll(k).view(x.shape)


def same(a, b):
    if not isinstance(a, torch.Tensor):
        return a == b or (a != a and b != b)
    if not isinstance(b, torch.Tensor) or a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = (x.to_dense() if x.layout is not torch.strided else x for x in (a, b))
    return torch.allclose(a, b, 1e-4, 1e-4, equal_nan=True) if a.numel() else True


def entry(x, k):
    if not isinstance(x, MemberTensor):
        return x
    return x.stack if x.hidden is None else x.stack[k]


def check(function, sample, draw, written):
    """Hold one call on member-valued tensors against the calls on each member's own."""
    leaves, spec = pytree.tree_flatten((sample.input, sample.args, sample.kwargs))
    tensors = [i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor) and x.layout is torch.strided]
    if not tensors:
        return
    own = {i for i in tensors if draw.random() < 0.6} or {draw.choice(tensors)}
    own |= {tensors[0]} if written else set()
    values = {i: [another(leaves[i], k) for k in range(K)] for i in own}

    def call(found):
        x, args, kwargs = pytree.tree_unflatten(found, spec)
        return function(x, *args, **kwargs)

    def copied(x):
        return x.clone() if isinstance(x, torch.Tensor) else x

    expected = []
    try:
        for k in range(K):
            given = [values[i][k].clone() if i in own else copied(x) for i, x in enumerate(leaves)]
            expected.append((call(given), given))
    except Exception:  # a member's own error
        return
    given = [
        MemberTensor(torch.stack(values[i]), all_members(K)) if i in own else copied(x) for i, x in enumerate(leaves)
    ]
    try:
        with Fold(all_members(K)):
            output = pytree.tree_leaves(call(given))
    except NotFoldable:  # the network is looped
        return
    for k in range(K):
        theirs = pytree.tree_leaves(expected[k][0])
        assert len(theirs) == len(output)
        assert all(same(entry(a, k), b) for a, b in zip(output, theirs, strict=True)), (sample, own)
        assert all(same(entry(given[i], k), expected[k][1][i]) for i in tensors), f"what it wrote to: {sample}"


def named(op, samples):
    """A call with its arguments by the names of torch's schema, the first one too; none where it has no schema."""
    try:
        names = [a.name for a in getattr(torch.ops.aten, op.name).default._schema.arguments if not a.kwarg_only]
    except AttributeError:
        return None
    for sample in samples:
        whole = {**dict(zip(names[1:], sample.args, strict=False)), **sample.kwargs}
        if sample.args and len(whole) == len(sample.args) + len(sample.kwargs):
            first = {"self": "input"}.get(names[0], names[0])
            return SimpleNamespace(input=sample.input, args=(), kwargs=whole), first
    return None


def seeded(seed):
    """The generators that samples are drawn by; torch's function keeps a stack trace a kind of device besides."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


@pytest.fixture
def plain_samples(monkeypatch):
    """Let the catalogue not look for the test that asks, by the source of every frame, at each sample."""
    for module in ("common_utils", "opinfo.core"):
        monkeypatch.setattr(f"torch.testing._internal.{module}.extract_test_fn", lambda: None)
    monkeypatch.setattr("torch.testing._internal.common_utils.set_rng_seed", seeded)


@pytest.mark.parametrize("first", sorted({name[:1] for name in NAMES}))
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("plain_samples")
def test_members_get_what_each_gets(first):
    draw = random.Random(0)
    for op in op_db:
        if op.name not in NAMES or not op.name.startswith(first):
            continue
        try:
            samples = list(op.sample_inputs("cpu", torch.float32, requires_grad=False))
        except (NotImplementedError, RuntimeError, TypeError):  # not of this dtype
            continue
        for function, written in ((op.op, False), (op.method_variant, False), (op.inplace_variant, True)):
            for sample in draw.sample(samples, min(2, len(samples))) if function is not None else ():
                try:
                    check(function, sample, draw, written)
                except Exception as error:
                    raise AssertionError(f"{op.name}: {error}") from error
        by_name = named(op, samples)
        if by_name is not None:
            sample, name = by_name
            check(lambda x, name=name, op=op, **given: op.op(**{name: x}, **given), sample, draw, False)
            if op.method_variant is not None:
                check(op.method_variant, sample, draw, False)


def pairs(x):
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * 1j)


def diagonal_written(x, value=1.0):
    y, i = x.clone(), torch.arange(3)
    y[..., i, i] = value if isinstance(value, float) else value(y[..., i, i])
    return y


@pytest.mark.parametrize(
    "index",
    [
        (torch.tensor([1, 0]), slice(None), torch.tensor([2, 0])),
        (torch.tensor([1, 0]), ..., torch.tensor([2, 0])),
        (slice(None), 1, torch.tensor([2, 0])),
        (torch.tensor([1, 0]), None, torch.tensor([2, 0])),
    ],
)
def test_indices_with_something_between_them(index):
    """What they choose moves to the front of each member's own."""
    stack = torch.randn(K, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    with Fold(all_members(K)):
        read, written = MemberTensor(stack, all_members(K))[index], MemberTensor(stack.clone(), all_members(K))
        written[index] = read + 1
    for k in range(K):
        expected = stack[k].clone()
        expected[index] += 1
        assert same(entry(read, k), stack[k][index])
        assert same(entry(written, k), expected)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x[:, torch.tensor([[0], [2]]), torch.tensor([1, 3])],
        lambda x: x[torch.tensor([1, 0]), torch.tensor([2, 0])],
        lambda x: x[..., torch.tensor([True, False, True]), torch.tensor([1, 3])][:, 1:],
        diagonal_written,
        lambda x: diagonal_written(x, lambda part: part * 2),
        lambda x: diagonal_written(x, lambda part: torch.ones(3)),
        lambda x: torch.einsum("... i d, ... j d -> ... i j", x, x),
        lambda x: torch.einsum("...id,...jd", x, x[0]),
        lambda x: torch.einsum("...d,de->...e", x, x[0].mT @ x[0]),
        lambda x: x.norm(dim=-1, keepdim=True),
        lambda x: x.norm(),
        lambda x: torch.norm(x, dim=(1, 2)),
        lambda x: torch.broadcast_tensors(x[:, :1], x[0], torch.ones(1))[0],
        lambda x: torch.nn.utils.rnn.pad_sequence([x[0], x[1, :2]], batch_first=True, padding_value=0.5),
        lambda x: torch.nn.utils.rnn.pad_sequence([x[0, :1], x[1]], padding_side="left"),
        pairs,
        lambda x: pairs(x.flatten()[2:8]),
        lambda x: pairs(x[..., :2]),
    ],
)
def test_needs_no_slices(function):
    """Functions of networks in tests/atlas: once for all members, and right."""
    stack = torch.randn(K, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    fold = Fold(all_members(K))
    with fold:
        output = function(MemberTensor(stack, all_members(K)))
    assert not fold.slices
    for k in range(K):
        assert same(entry(output, k), function(stack[k]))


@pytest.mark.parametrize("question", [lambda x: x.type(), lambda x: x.half().type(), lambda x: x.double().type()])
def test_the_name_of_a_type_is_a_members(question):
    stack = torch.randn(K, 2, 3)
    with Fold(all_members(K)):
        assert question(MemberTensor(stack, all_members(K))) == question(stack[0])


class OneBias(torch.nn.Module):
    """A product to all of whose features one number is added."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = torch.nn.Parameter(torch.zeros(4, 3)), torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight, self.bias)


@pytest.mark.parametrize("shape", [(3,), (5, 3), (2, 5, 3)])
def test_one_bias_for_all_features(shape):
    held = Held(lambda _: OneBias())
    held.sampling(batch(*shape))
    assert held.ensemble.report().plans or len(shape) == 1
    held.everywhere(batch(*shape))
    assert not held.warned
