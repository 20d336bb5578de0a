"""A network's own autograd.Functions: their code sees one member's tensors, and gives one member's gradients."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fastens
from tests.fold.contract import Held, averaged, batch, gradients_of, made, near


class Saved(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        assert grad.shape == x.shape
        return grad * x.cos()


class Once(Saved):
    backward = staticmethod(once_differentiable(Saved.backward))


class Separate(Function):
    """With a context that is set up apart, an argument that is no tensor, and a saved output."""

    @staticmethod
    def forward(x, scale=2.0):
        return (x * scale).exp()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.scale = inputs[1]
        ctx.save_for_backward(output, None)

    @staticmethod
    def backward(ctx, grad):
        output, nothing = ctx.saved_tensors
        assert nothing is None
        return grad * ctx.scale * output, None


class Straight(Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


class Clipped(Function):
    """Gives its argument back; the derivative is not linear, so each member's goes through it alone."""

    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad.clamp(-0.02, 0.02)


class Reversed(Function):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad.neg() * ctx.scale, None


class Affine(Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight if ctx.needs_input_grad[0] else None, grad.t() @ x, grad  # which torch sums to the bias


class Nested(Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return Nested.apply(grad, weight.t()), Nested.apply(grad.t(), x.t())


class Several(Function):
    @staticmethod
    def forward(ctx, x):
        power, index = x.exp(), x.argmax(-1)
        ctx.mark_non_differentiable(index)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(power)
        return power, index, x * 2, "name"

    @staticmethod
    def backward(ctx, grad, of_index, unused, of_name):
        assert unused is None
        assert of_index is None
        return grad * ctx.saved_tensors[0]


class InPlace(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x.exp_())
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0]


class Constant(Function):
    """An output that depends on no member, of an argument whose gradient is each member's."""

    @staticmethod
    def forward(ctx, x):
        return torch.ones(x.shape[0], 4)

    @staticmethod
    def backward(ctx, grad):
        return grad.square()


class Rerun(Function):
    """The checkpoint of guided-diffusion: it differentiates by the weights that it was given."""

    @staticmethod
    def forward(ctx, run, length, *args):
        ctx.run, ctx.inputs, ctx.weights = run, list(args[:length]), list(args[length:])
        with torch.no_grad():
            return run(*ctx.inputs)

    @staticmethod
    def backward(ctx, *grads):
        ctx.inputs = [x.detach().requires_grad_(True) for x in ctx.inputs]
        with torch.enable_grad():
            output = ctx.run(*[x.view_as(x) for x in ctx.inputs])
        found = torch.autograd.grad(output, ctx.inputs + ctx.weights, grads, allow_unused=True)
        del ctx.inputs, ctx.weights
        return (None, None, *found)


class ReadsInForward(Saved):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.from_numpy(x.detach().numpy()).sin()


class ReadsInBackward(Saved):
    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].cos() if float(grad.sum()) else grad


class CallsTheEngine(Function):
    @staticmethod
    def forward(ctx, run, x):
        ctx.run = run
        ctx.save_for_backward(x)
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.run(x)
        torch.autograd.backward(y, grad)
        return None, x.grad


class Network(nn.Module):
    def __init__(self, use):
        super().__init__()
        self.first, self.second, self.use = nn.Linear(4, 4), nn.Linear(4, 4), use

    def mix(self, h):
        return torch.tanh(self.second(h))

    def forward(self, x):
        return self.use(self, x, torch.tanh(self.first(x)))


def of_several(net, x, h):
    power, index, _, name = Several.apply(h)
    return net.second(power) + index[:, None] + len(name)


FOLDED = {
    "saved": lambda net, x, h: net.second(Saved.apply(h)),
    "last": lambda net, x, h: Saved.apply(h),
    "once": lambda net, x, h: Once.apply(h),
    "separate": lambda net, x, h: net.second(Separate.apply(h)) + Separate.apply(h, 0.5),
    "straight": lambda net, x, h: net.second(Straight.apply(3 * h)),
    "clipped": lambda net, x, h: net.second(Clipped.apply(h)),
    "clipped input": lambda net, x, h: net.second(Clipped.apply(x)),
    "constant": lambda net, x, h: net.second(h) * Constant.apply(x),
    "reversed": lambda net, x, h: net.second(Reversed.apply(h, 0.3)),
    "affine": lambda net, x, h: Affine.apply(h, net.second.weight, net.second.bias) * 1.5,
    "affine input": lambda net, x, h: Affine.apply(x, net.second.weight, net.second.bias) + h,
    "nested": lambda net, x, h: Nested.apply(h, net.second.weight),
    "several": of_several,
    "in place": lambda net, x, h: net.second(InPlace.apply(h * 1)),
    "rerun": lambda net, x, h: Rerun.apply(net.mix, 1, h, *net.second.parameters()),
    "rerun input": lambda net, x, h: Rerun.apply(net.mix, 1, x, *net.second.parameters()) + h,
    "checkpoint": lambda net, x, h: checkpoint(lambda y: net.mix(Saved.apply(y)), h, use_reentrant=False),
    "reentrant": lambda net, x, h: checkpoint(net.mix, h, use_reentrant=True),
}
LOOPED = {
    "reads in forward": lambda net, x, h: net.second(ReadsInForward.apply(h)),
    "reads in backward": lambda net, x, h: net.second(ReadsInBackward.apply(h)),
    "calls the engine": lambda net, x, h: CallsTheEngine.apply(net.mix, h),
}
USES = FOLDED | LOOPED
VECTORS = batch(5, 4)


def zeros(gradients, like):
    return [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, like, strict=True)]


def derivatives(held, call, loop):
    """Hold the gradients of input and weights against those of ``loop``."""
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(3), requires_grad=True)
    found = []
    for run in (loop, lambda y: held.quietly(lambda: call(y))):
        for each in (x, *held.ensemble.parameters(), *(p for m in held.members for p in m.parameters())):
            each.grad = None
        output = run(x)
        (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(4))).sum().backward()
        found.append((output.detach(), *zeros([x.grad], [x])))
        if run is loop:
            theirs = [zeros([p.grad for p in m.parameters()], m.parameters()) for m in held.members]
    near(found[1], found[0], 1e-4)
    ours = list(gradients_of(held.ensemble).values())
    theirs = [torch.stack(column) for column in zip(*theirs, strict=True)]
    near(zeros(ours, theirs), theirs, 1e-4)


@pytest.mark.parametrize("use", USES)
def test_gradients_are_the_members(use):
    held = Held(lambda k: Network(USES[use]))
    for _ in range(2):
        derivatives(held, held.ensemble, lambda x: averaged(held.loop(x)))
    held.sampling(VECTORS)
    held.gradients(VECTORS)
    assert held.ensemble.engine == ("fold" if use in FOLDED else "loop")
    assert bool(held.warned) is (use in LOOPED)


DEALT = [0, 1, 2, 1, 0]


def dealt(held):
    """The call whose rows have a member each, and the loop that it is held against: each member on the whole batch."""

    def call(x):
        with held.ensemble.assigned(DEALT):
            return held.ensemble(x)

    def loop(x):
        outputs = held.loop(x)
        return torch.stack([outputs[k][i] for i, k in enumerate(DEALT)])

    return call, loop


@pytest.mark.parametrize("max_fold", [None, 5])
@pytest.mark.parametrize(
    "use", ["saved", "clipped input", "affine", "rerun", "rerun input", "in place", "reads in backward"]
)
def test_of_rows_and_of_some_members(use, max_fold):
    held = Held(lambda k: Network(USES[use]), max_fold=max_fold)
    for _ in range(2):
        derivatives(held, *dealt(held))
        derivatives(held, held.ensemble, lambda x: averaged(held.loop(x)))


class MixesInBackward(Saved):
    @staticmethod
    def backward(ctx, grad):
        return grad / (1 + grad.norm())


def test_a_backward_that_mixes_rows_is_not_folded_by_rows():
    held = Held(lambda k: Network(lambda net, x, h: net.second(MixesInBackward.apply(h))))
    derivatives(held, held.ensemble, lambda x: averaged(held.loop(x)))
    assert held.ensemble.engine == "fold"
    derivatives(held, *dealt(held))
    assert held.ensemble.engine == "loop"


@pytest.mark.parametrize("use", ["saved", "separate", "clipped input", "nested", "in place", "checkpoint"])
def test_second_derivatives(use):
    held = Held(lambda k: Network(USES[use]))
    x = torch.randn(5, 4, requires_grad=True)
    found = []
    for call in (lambda x: averaged(held.loop(x)), held.ensemble):
        (first,) = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
        found.append((first.detach(), *torch.autograd.grad(first.square().sum(), x)))
    near(found[1], found[0], 2e-4)
    assert held.ensemble.engine == "fold"


def test_derivatives_that_a_network_takes_of_itself():
    def energy(net, x, h):
        with torch.enable_grad():
            y = x.detach().requires_grad_()
            value = net.second(Saved.apply(net.first(y))).square().sum()
            return torch.autograd.grad(value, y, create_graph=True)[0]

    held = Held(lambda k: Network(energy))
    held.gradients(VECTORS)
    held.sampling(VECTORS)
    assert held.ensemble.engine == "fold"


def test_a_function_that_a_later_call_takes_first():
    held = Held(lambda k: Network(lambda net, x, h: net.second(ReadsInBackward.apply(h) if len(x) > 5 else h)))
    held.gradients(VECTORS)
    held.gradients(VECTORS)
    assert held.ensemble.engine == "fold"
    held.gradients(batch(6, 4))
    assert held.ensemble.engine == "loop"


class Warmed(Saved):
    """Reads values in the backward of some calls alone."""

    @staticmethod
    def backward(ctx, grad):
        return grad * 2 if len(grad) > 5 and bool(grad.sum()) else grad


def test_a_backward_that_reads_values_only_later_names_the_remedy():
    held = Held(lambda k: Network(lambda net, x, h: net.second(Warmed.apply(h))))
    held.gradients(VECTORS)
    with pytest.raises(Exception, match=r"backward of Warmed.*engine='loop'"):
        held.gradients(batch(6, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_in_other_precision(dtype):
    members = [made(lambda k: Network(USES["saved"]).to(dtype), k) for k in range(3)]
    ensemble = fastens.Ensemble(members)
    ensemble(torch.randn(5, 4).to(dtype)).sum().backward()
    assert ensemble.engine == "fold"
    assert all(p.grad is not None for p in ensemble.parameters())


def test_the_check_leaves_gradients_and_hooks_alone():
    held = Held(lambda k: Network(USES["saved"]))
    called = []
    for p in held.ensemble.parameters():
        p.register_post_accumulate_grad_hook(called.append)
    held.ensemble(torch.randn(5, 4))
    assert not called
    assert all(p.grad is None for p in held.ensemble.parameters())


def test_threads():
    held = Held(lambda k: Network(USES["affine"]))

    def work(seed):
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        for _ in range(4):
            ours, theirs = held.ensemble(x), averaged([m(x) for m in held.members])
            near(*[torch.autograd.grad(y.square().sum(), x)[0] for y in (ours, theirs)], 1e-4)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, range(3)))
    assert held.ensemble.engine == "fold"
