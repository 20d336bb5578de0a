"""Whole runs of every member in one run of a sampler that does not know of it, against the members' own runs."""

import inspect

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
)
from torch import nn
from torchdiffeq import odeint

import fastens
from fastens.evaluation import Denoiser
from fastens.evaluation import sample as sample_by_ddim
from tests.networks import mlp, randomised, small_unet
from tests.tolerances import relative_error
from tests.whole_runs import (  # noqa: F401
    CONDITION,
    DOUBLE,
    K,
    N,
    Which,
    alone,
    runs_are_made_together,
    steps,
    together,
    unets,
)


@pytest.fixture(params=["fold", "loop"])
def which(request):
    return fastens.Ensemble([Which(k) for k in range(K)], engine=request.param)


def test_which_members_run(which):
    flat = steps(which, 1, noise=torch.zeros_like)
    for chosen, expected in ((None, [0, 1, 2]), (2, [0, 1]), ([2, 0, 2], [2, 0, 2]), (torch.tensor([1]), [1])):
        found = fastens.sample_members(flat, chosen, N, ensemble=which, generator=0)
        assert found.shape == (len(expected), N, 3)
        torch.testing.assert_close(
            found - found[:1], torch.tensor(expected)[:, None, None] - float(expected[0]) + found[:1] * 0
        )


def test_members_share_a_trajectory_up_to_the_branch(which):
    for branch in (0, 1, 3):
        found = together(steps, which, branch_at=branch)
        expected = alone(lambda k, branch=branch: steps_by_number(which, k, branch), range(K))
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("members", [None, [2, 0]])
@pytest.mark.parametrize("branch", [1, 3])
def test_arguments_of_the_members_own_before_the_branch(which, branch, members):
    """The rule's answer is of all members, each by its own argument, whichever runs are asked for."""
    own = torch.tensor([0.5, -1.0, 4.0])
    given = fastens.PerMember(list(own))
    found = fastens.sample_members(
        steps(which, noise=torch.zeros_like), members, N, ensemble=which, generator=0, branch_at=branch, condition=given
    )
    asked = torch.tensor([0, 1, 2] if members is None else members)
    moved = branch * (own.mean() + 1) + (4 - branch) * (asked + own[asked])
    torch.manual_seed(0)
    torch.testing.assert_close(found, torch.randn(N, 3) + moved[:, None, None])


def test_runs_that_must_be_apart_have_no_common_part_by_own_arguments(which):
    def reads(num, condition):
        x = which(torch.zeros(num, 3), condition)
        return which(x if float(which(x, condition)[0, 0]) > 0 else -x, condition)

    with pytest.raises(ValueError, match=r"one after the other.*all members' own arguments \(PerMember\)"):
        fastens.sample_members(
            reads, None, N, ensemble=which, branch_at=1, condition=fastens.PerMember(list(torch.arange(3.0)))
        )


def steps_by_number(which, k, branch):
    def sample(num):
        x = torch.randn(num, 3)
        for i in range(4):
            x = x + (which(x) if i < branch else k) + torch.randn_like(x)
        return x

    return sample


def test_noise_is_shared_or_each_members_own(which):
    def ends(**options):
        found = together(steps, which, **options)
        return found - 4 * torch.arange(K)[:, None, None]

    shared, own, branched = ends(), ends(shared_noise=False), ends(shared_noise=False, branch_at=4 - 1)
    torch.testing.assert_close(shared, shared[:1].expand(K, N, 3))
    assert all((own[i] - own[j]).abs().min() > 1e-4 for i in range(K) for j in range(i))
    assert (branched[0] - branched[1]).abs().min() > 1e-4


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: torch.bernoulli(torch.sigmoid(x)),
        lambda x: torch.normal(x, 1.0),
        lambda x: torch.empty_like(x).uniform_(),
        lambda x: (x * 1).normal_(),
        lambda x: torch.rand(len(x), 1) * x,
        lambda x: x[torch.randperm(len(x))],
        lambda x: nn.functional.dropout(x, 0.5, training=False),
    ],
    ids="bernoulli normal uniform_ normal_ rand randperm dropout".split(),
)
def test_what_is_drawn_by_values_is_what_each_member_would_draw(which, draw):
    def with_noise(model):
        return steps(model, noise=draw)

    expected = alone(with_noise, [Which(k) for k in range(K)])
    torch.testing.assert_close(together(with_noise, which), expected)


def test_arguments_of_each_member(which):
    conditions = torch.randn(K, N, 3)
    expected = torch.stack(
        [alone(lambda m, c=c: steps(m, condition=c), [Which(k)])[0] for k, c in enumerate(conditions)]
    )
    given = fastens.PerMember(list(conditions))
    torch.testing.assert_close(together(steps, which, condition=given), expected)
    torch.testing.assert_close(together(lambda m: steps(m, condition=given), which), expected)


def test_gradients_inside_a_sampler():
    """Guidance by the gradient of a residual, as in arXiv 2209.14687."""
    members = [randomised(mlp, k).double() for k in range(K)]

    def guided(model):
        def sample(num):
            x = torch.randn(num, 5, dtype=torch.float64)
            for _ in range(3):
                with torch.enable_grad():
                    y = x.detach().requires_grad_()
                    clean = model(y)
                    residual = (clean[:, :2] - 1).square().sum().sqrt()
                gradient = torch.autograd.grad(residual, y)[0]  # where gradients are off, as deepinv asks for it
                x = 0.5 * (x + clean.detach()) - 0.1 * gradient
            return x

        return sample

    assert relative_error(together(guided, fastens.Ensemble(members)), alone(guided, members)) < DOUBLE


def reads(model):
    def sample(num):
        x, count = torch.randn(num, 3), 0
        while x.mean() < 5 and count < 20:  # as many steps as the member needs
            x, count = x + model(x) + torch.rand_like(x), count + 1
        return x

    return sample


def writes(model):
    def sample(num):
        kept = torch.zeros(num, 3)
        x = torch.randn(num, 3)
        for _ in range(3):
            kept[:] = model(x)  # common until now
            x = x + kept
            x.clamp_(-3, 3)
        return x

    return sample


def adaptive(model):
    def sample(num):
        return odeint(lambda t, x: model(x) - x, torch.randn(num, 3), torch.tensor([0.0, 1.0]), rtol=1e-4)[-1]

    return sample


def counts(model):
    return steps(model, noise=lambda x: torch.poisson(x.abs()) + torch.rand_like(x))  # draws until it accepts


@pytest.mark.parametrize("sample", [reads, adaptive, counts])
def test_samplers_that_read_values_run_member_by_member_with_a_warning(which, sample):
    generator = torch.Generator().manual_seed(0)

    def with_own_generator(model):
        def run(num):
            return sample(model)(num) + torch.rand(num, 3, generator=generator)

        return run

    with pytest.warns(UserWarning, match="one after the other, because .* (no one answer|than for another)"):
        ours = together(with_own_generator, which)
    expected = []
    for k in range(K):
        generator.manual_seed(0)
        expected += alone(with_own_generator, [Which(k)])
    torch.testing.assert_close(ours, torch.stack(expected))


def test_samplers_that_write_what_differs_to_what_is_common(which):
    torch.testing.assert_close(together(writes, which), alone(writes, [Which(k) for k in range(K)]))


def test_what_ends_in_an_array_runs_member_by_member():
    members, schedule = [randomised(small_unet, k) for k in range(K)], fastens.schedules.VP()

    def ddim(model):
        denoiser = Denoiser(model, schedule, "epsilon")
        return lambda num, seed=0: sample_by_ddim(denoiser, num, (1, 8, 8), steps=2, seed=seed)

    ensemble = fastens.Ensemble(members)
    with pytest.warns(UserWarning, match="one after the other"):
        ours = fastens.sample_members(ddim(ensemble), None, N, ensemble=ensemble, generator=4, shared_noise=False)
    theirs = [ddim(member)(K * N, 4)[k * N : (k + 1) * N] for k, member in enumerate(members)]
    torch.testing.assert_close(ours, torch.stack(theirs), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("masks", ["fixed", "fresh"])
def test_masks_have_runs(masks):
    model = randomised(lambda: nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Dropout(0.5), nn.Linear(16, 3)), 0)
    ensemble = fastens.MCDropout(model, K, masks=masks)

    def sample(num):
        x = torch.randn(num, 3)
        with ensemble.trajectory(num, 3):
            for _ in range(3):
                x = x + ensemble(x)
        return x

    ours = fastens.sample_members(sample, None, N, ensemble=ensemble, generator=0)
    for k in range(K):
        torch.manual_seed(0)
        with torch.no_grad():
            x = torch.randn(N, 3)
            with ensemble.trajectory(N, 3):
                for _ in range(3):
                    x = x + ensemble.member_outputs(x)[k]
        torch.testing.assert_close(ours[k], x)


def test_draws_of_a_posterior_have_runs():
    model = randomised(mlp, 0)
    data = [torch.randn(4, 5)]
    ensemble = fastens.laplace(model, lambda m, x: (m(x) - x).square().mean(1), data, K)
    members = list(ensemble.members)

    def sample(model):
        def run(num):
            x = torch.randn(num, 5)
            for _ in range(3):
                x = x + 0.1 * model(x)
            return x

        return run

    torch.testing.assert_close(together(sample, ensemble), alone(sample, members))


def test_a_run_is_of_its_context_and_leaves_nothing_behind(which):
    state = torch.get_rng_state()
    found = fastens.sample_members(steps(which), None, N, ensemble=which, generator=3)
    assert torch.equal(state, torch.get_rng_state())
    torch.testing.assert_close(found, together(steps, which, seed=3))
    with torch.no_grad():
        assert which(torch.zeros(1, 3))[0, 0] == 1  # the mean of 0, 1 and 2
    with pytest.raises(ZeroDivisionError):
        fastens.sample_members(lambda num: which(torch.zeros(num, 3)) / (1 // 0), None, N, ensemble=which)
    with torch.no_grad():
        assert which(torch.zeros(1, 3))[0, 0] == 1
    assert not torch._C._len_torch_function_stack()


def test_one_pass_an_evaluation_and_one_plan():
    ensemble = fastens.Ensemble(unets(torch.float32))
    calls = []
    evaluate = ensemble._engine.evaluate
    ensemble._engine.evaluate = lambda *args: calls.append(args[0].batch_size) or evaluate(*args)

    def sample(num):
        x = torch.randn(num, 1, 8, 8)
        for t in torch.linspace(999, 0, 5):
            x = x - 0.1 * ensemble(x, t).sample
        return x

    fastens.sample_members(sample, None, 4, ensemble=ensemble)
    assert calls == [4] * 5


def call(*args, **kwargs):
    return lambda which: fastens.sample_members(steps(which), *args, **{"ensemble": which, **kwargs})


def inside_an_assignment(which):
    with which.assigned([0]):
        call(None, N)(which)


BAD = [
    (call(None, 0), ValueError, "num_samples is 0, expected at least one"),
    (call(None, 1.0), TypeError, "num_samples is a float"),
    (call(0, N), ValueError, "members is 0, expected 1 to 3"),
    (call(4, N), ValueError, "members is 4, expected 1 to 3"),
    (call([0, 3], N), ValueError, r"sample_members: members\[1\] is 3, expected 0 to 2"),
    (call([0.5], N), TypeError, "expected int64"),
    (call(None, N, branch_at=-1), ValueError, "branch_at is -1"),
    (call(None, N, branch_at=4), ValueError, "branch_at is 4, but the sampler evaluated the ensemble 4 times"),
    (call(None, N, ensemble=None), TypeError, "expected the fastens.Ensemble that the sampler calls, got none"),
    (call(None, N, ensemble=nn.Linear(1, 1)), TypeError, "got a Linear"),
    (call(None, N, condition=fastens.PerMember([0.0, 1.0])), ValueError, "PerMember has 2 values, expected one for"),
    (lambda which: fastens.sample_members(3, None, N), TypeError, "sampler is a int"),
    (inside_an_assignment, RuntimeError, "already assigned"),
    (
        lambda which: call(None, N, branch_at=1, ensemble=which.with_rule("mixture"))(which),
        ValueError,
        "rule 'mixture' draws members",
    ),
]


@pytest.mark.parametrize(("use", "error", "message"), BAD, ids=[message for _, _, message in BAD])
def test_bad_input_is_named(use, error, message, which):
    with pytest.raises(error, match=message):
        use(which)
    with torch.no_grad():
        assert which(torch.zeros(1, 3))[0, 0] == 1


def test_a_pipeline_without_an_ensemble_is_named():
    pipe = DDIMPipeline(randomised(small_unet, 0), DDIMScheduler())
    with pytest.raises(TypeError, match="the pipeline has 0 ensembles among its parts"):
        fastens.sample_members(pipe, None, N)


def test_the_signature_is_documented():
    documented = fastens.sample_members.__doc__
    names = [n for n in inspect.signature(fastens.sample_members).parameters if n != "arguments"]
    assert all(f"{name}:" in documented for name in names)
