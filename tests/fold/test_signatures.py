"""Forms in which torch takes its functions, and what they share memory with: members get what each gets, or none."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastens
from fastens.fold.dispatch import RANDOM, Fold, inside
from fastens.fold.names import named
from fastens.fold.tensor import MemberTensor, NotFoldable, all_members

K = 3


def values(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float32).to(dtype)


def check(function, *inputs, refused=False):
    """Hold a function of inputs that differ between members against that of each member's own."""
    stacks = [torch.stack([x * (1 + k / 4) if x.is_floating_point() else x for k in range(K)]) for x in inputs]
    expected = [function(*(stack[k].clone() for stack in stacks)) for k in range(K)]
    fold = Fold(all_members(K), wrapped=True)
    given = [MemberTensor(stack.clone(), all_members(K)) for stack in stacks]
    try:
        with inside(fold):
            found = function(*given)
    except NotFoldable:
        assert refused
        return
    assert not refused
    for k in range(K):
        own = found if not isinstance(found, MemberTensor) else found.stack[k] if found.hidden else found.stack
        assert own.shape == expected[k].shape
        assert own.dtype == expected[k].dtype
        near = {torch.float64: 1e-12, torch.bfloat16: 4e-2}.get(own.dtype, 1e-5)
        torch.testing.assert_close(own, expected[k], rtol=near, atol=near)


REDUCED = {
    **{
        f"{name}{args}": lambda x, name=name, args=args: getattr(x, name)(*args)
        for name in ("std", "var")
        for args in ((1, False), (1, True), (1, False, True), ((0, 2), False), (False,))
    },
    "std_mean(1, False)": lambda x: torch.std_mean(x, 1, False)[0],
    "all over none": lambda x: (x > 0).all(dim=()),
    "any over none": lambda x: (x > 0).any(dim=(), keepdim=True),
    "keepdims": lambda x: x.mean(axis=1, keepdims=True),
    "an axis of a sort": lambda x: torch.sort(x, axis=1).values,
}


@pytest.mark.parametrize("function", REDUCED.values(), ids=REDUCED)
def test_reductions(function):
    check(function, values(2, 3, 4))


@pytest.mark.parametrize(
    "given", [(values(3), torch.tensor(0.1, dtype=torch.float64)), (torch.tensor(0.1, dtype=torch.float64), values(3))]
)
def test_powers_in_double_precision_are_of_numbers_in_their_own(given):
    base, exponent = given
    check(lambda a, b: torch.float_power(a.abs(), b), base, exponent)


def test_comparisons_with_what_is_no_number():
    check(lambda x: x * (1 if (x == None) else 2), values(3))  # noqa: E711  (as older code has it)


def by_torch(x, mean, var, weight, bias):
    return torch.batch_norm(x, weight, bias, mean, var.abs(), False, 0.1, 1e-3, False)


def instance_by_torch(x, mean, var, weight, bias):
    return torch.instance_norm(x, weight, bias, mean, var.abs(), False, 0.1, 1e-3, False)


@pytest.mark.parametrize("function", [by_torch, instance_by_torch])
def test_normalisations_that_take_parameters_in_another_order(function):
    check(function, values(2, 4, 3), *(values(4) + shift for shift in (0, 2, 3, 4)))


NORMS = {
    "group": lambda x, w: F.group_norm(x, 2, w),
    "layer": lambda x, w: F.layer_norm(x, (4,), w),
    "rms": lambda x, w: F.rms_norm(x, (4,), w),
    "batch": lambda x, w: F.batch_norm(x, w, w.abs() + 1),
}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_parameters_of_more_precision_leave_the_precision_of_the_input(norm):
    check(norm, values(3, 4, dtype=torch.bfloat16), values(4))


@pytest.mark.parametrize(("queries", "keys"), [((K, 4), (K, 5, 4)), ((K, 4), (K, 2, 5, 4)), ((K, K, 4), (5, 4))])
def test_attention_between_tensors_of_other_dimensions(queries, keys):
    check(lambda q, k: F.scaled_dot_product_attention(q, k, k + 1), values(*queries), values(*keys))


def test_attention_believes_that_a_mask_is_causal():
    def attention(x, projections, out):
        mask = torch.ones(3, 3)
        return F.multi_head_attention_forward(
            x,
            x,
            x,
            4,
            2,
            projections,
            None,
            None,
            None,
            False,
            0.0,
            out,
            None,
            False,
            None,
            False,
            mask,
            is_causal=True,
        )[0]

    check(attention, values(3, 2, 4), values(12, 4), values(4, 4))


@pytest.mark.parametrize("empty", [torch.tensor([]), torch.tensor([], dtype=torch.float64)])
def test_empty_tensors_that_are_skipped_have_a_dtype(empty):
    check(lambda x: torch.cat([empty, x.long()]), values(2, 3))
    check(lambda x: torch.cat([x, empty]), values(2, 3))


def test_products_with_a_number_of_no_dimension():
    check(torch.inner, values(1)[0], values(3))


VIEWS = {
    "diagonal": (lambda x: x.diagonal(0, 1, 2), True),
    "select by name": (lambda x: x.select(dim=1, index=0), True),
    "narrow by name": (lambda x: x.narrow(dim=1, start=0, length=2), True),
    "real": (lambda x: x.real, True),
    "ravel": (lambda x: x.ravel(), True),
    "a copy by position": (lambda x: x.to(torch.float32, False, True), True),
    "contiguous of another order": (lambda x: x.transpose(0, 1).contiguous(), True),
    "hsplit": (lambda x: x.hsplit(3)[0], False),
    "a number of each member's": (lambda x: x[(x.sum() * 0).long()], False),
}


def write_to_view(view, x):
    view(x).mul_(2)
    return x


def write_to_tensor(view, x):
    seen = view(x)
    x.mul_(2)
    return seen


def write_by_function(view, x):
    F.relu(view(x), inplace=True)
    return x


@pytest.mark.parametrize("write", [write_to_view, write_to_tensor, write_by_function])
@pytest.mark.parametrize(("view", "folds"), VIEWS.values(), ids=VIEWS)
def test_writes_reach_what_views_share(view, folds, write):
    check(lambda x: write(view, x), values(4, 3, 4), refused=not folds)


def test_copies_that_are_gone_refuse_no_writes():
    check(lambda x: x.mul_(x.hsplit(3)[0].sum()), values(4, 3, 4))


def test_views_of_what_members_share_are_not_written_to():
    def function(x):
        table = torch.zeros(3)
        table[(x[0] * 0).long()].add_(1)
        return table + x

    check(function, values(3), refused=True)


def required(x):
    h = F.group_norm(F.group_norm(x, 2).detach(), 2)
    h.requires_grad_(True)
    return torch.autograd.grad((F.linear(h, torch.ones(2, 3)) ** 3).sum(), h)[0]


def detached(x):
    h = F.group_norm(x, 2)
    return F.linear(h.detach_().requires_grad_(), torch.ones(2, 3)).detach()


def replaced(x):
    h = F.group_norm(x, 2)
    h.data = h.data * 2
    return F.linear(h, torch.ones(2, 3))


def several_seeds(x):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(x.flatten().tanh(), x, torch.eye(24)[:K], is_grads_batched=True)[0]


@pytest.mark.parametrize("function", [required, detached, replaced, several_seeds])
def test_derivatives_of_what_a_pass_made(function):
    check(function, values(2, 4, 3))


def of_which(x):
    return x * (1 if x._is_view() else 2)


@pytest.mark.parametrize("function", [of_which, lambda x: x * float(f"{x.sum():.3f}"), lambda x: x * len(repr(x))])
def test_questions_that_have_no_one_answer(function):
    check(function, values(3), refused=True)


DRAWS = {
    "nn.init.normal_": lambda x: nn.init.normal_(torch.zeros(4, 4).to(x)),
    "nn.init.kaiming_uniform_": lambda x: nn.init.kaiming_uniform_(torch.zeros(4, 4).to(x)),
    "gamma": lambda x: torch.distributions.Gamma(x.abs() + 1, 1.0).sample(),
    "dirichlet": lambda x: torch.distributions.Dirichlet(x.abs() + 1).sample(),
    "binomial": lambda x: torch.binomial(x * 0 + 1000, x * 0 + 0.5),
    "native_dropout": lambda x: torch.native_dropout(x, 0.5, True)[0],
    "an operation": lambda x: torch.ops.aten.randn_like(x),
    "an overload in place": lambda x: torch.ops.aten.uniform_.default(x.clone()),
    "randint by names": lambda x: torch.randint(low=0, high=1 << 40, size=(4,)),
    "into a tensor": lambda x: torch.randn(4, out=torch.empty(4).to(x)),
    "another layout": lambda x: torch.rand_like(x[:, :, None, None], memory_format=torch.channels_last),
    "between recurrent layers": lambda x: torch.lstm(
        x[None], (torch.zeros(2, 1, 4), torch.zeros(2, 1, 4)), [torch.ones(16, 4)] * 4, False, 2, 0.5, True, False, True
    )[0],
}  # fmt: skip


@pytest.mark.parametrize("function", DRAWS.values(), ids=DRAWS)
def test_draws_of_common_values_are_each_members_own(function):
    x = values(6, 4).abs()
    fold = Fold(all_members(K), wrapped=True)
    with inside(fold):
        drawn = function(fold.common(x))
    assert isinstance(drawn, MemberTensor)
    assert drawn.hidden is fold.hidden
    assert drawn.shape == function(x).shape
    assert not any(torch.equal(drawn.stack[0], other) for other in drawn.stack[1:])


def test_all_that_torch_says_draws_is_known():
    tagged = {
        schema.name.removeprefix("aten::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("aten::") and torch.Tag.nondeterministic_seeded in _tags(schema)
    }
    parts = ("attention", "cudnn", "miopen", "mps", "sdp", "mask", "nested")  # of functions that are known, or none's
    unknown = {name for name in tagged if not any(part in name for part in parts) and set(named(name)) - RANDOM.keys()}
    assert not unknown


def _tags(schema):
    packet = getattr(torch.ops.aten, schema.name.removeprefix("aten::"), None)
    return getattr(getattr(packet, schema.overload_name or "default", None), "tags", ())


class Keyed(nn.Module):
    """A network that finds a factor by its time, written as text."""

    def __init__(self, text):
        super().__init__()
        self.layer, self.text, self.factors = nn.Linear(3, 3), text, {"0": 2.0, "tensor(0.)": 2.0}

    def forward(self, x, t):
        """Return the scores."""
        return self.layer(x) * self.factors.get(self.text(t[0]), 1.0)


@pytest.mark.parametrize("text", [str, repr, lambda t: f"{t:.0f}"], ids=["str", "repr", "format"])
def test_plans_hold_no_text_of_values(text):
    torch.manual_seed(0)
    members = [Keyed(text).eval() for _ in range(K)]
    x = values(2, 3)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        ensemble = fastens.Ensemble(members)
        for time in (7.0, 7.0, 0.0):
            t = torch.full((2,), time)
            torch.testing.assert_close(ensemble(x, t), sum(member(x, t) for member in members) / K)
