"""Rows that have members: whole trajectories of every member in one pass of samplers that do not know of it."""

import asyncio
import copy
import threading

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler
from torch import nn

import fastens
from fastens.evaluation import Denoiser
from fastens.evaluation.ode import AugmentedFlow
from fastens.ops.run_program import available
from fastens.samplers import Sampler
from tests.networks import mlp, randomised, small_unet
from tests.test_draws import Which

K = 4


@pytest.fixture(params=["fold", "loop"])
def which(request):
    return fastens.Ensemble([Which(k) for k in range(K)], engine=request.param)


def drawn(ens, rows):
    with torch.no_grad():
        return ens(torch.zeros(rows, 3))[:, 0].long().tolist()


def unets(dtype=torch.float32):
    return [randomised(lambda: small_unet(True), k).to(dtype) for k in range(K)]


class RowByRow(nn.Module):
    """The oracle: each row by its member alone."""

    def __init__(self, members, rows):
        super().__init__()
        self.members, self.rows = members, rows

    def forward(self, x, *args):
        def of_row(i, value):
            return value[i : i + 1] if isinstance(value, torch.Tensor) and value.shape[:1] == x.shape[:1] else value

        rows = self.rows * (len(x) // len(self.rows))
        one = [self.members[k](x[i : i + 1], *(of_row(i, arg) for arg in args)) for i, k in enumerate(rows)]
        return torch.cat([out if isinstance(out, torch.Tensor) else out.sample for out in one])


def test_each_row_is_its_members(which):
    for rows in ([3, 0, 0, 2, 1], torch.tensor([3, 0, 0, 2, 1]), (3, 0, 0, 2, 1)):
        with which.assigned(rows):
            assert drawn(which, 5) == [3, 0, 0, 2, 1]
            assert drawn(which, 10) == [3, 0, 0, 2, 1] * 2  # guidance repeats the batch
            assert drawn(which, 15) == [3, 0, 0, 2, 1] * 3
    assert drawn(which, 1) == [1]  # the mean of 0 to 3, rounded down


def test_guidance_says_which_batches_there_are(which):
    with which.assigned([1, 2], guidance=2):
        assert drawn(which, 2) == [1, 2]  # guidance may be off at some noise levels
        assert drawn(which, 4) == [1, 2, 1, 2]


def test_rows_of_each_member_in_their_order(which):
    with which.assigned(per_member=2):
        assert drawn(which, 8) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_the_members_are_those_that_were_given(which):
    rows = torch.tensor([1, 2])
    with which.assigned(rows):
        rows.zero_()
        assert drawn(which, 2) == [1, 2]


@pytest.mark.parametrize("rule", ["median", "alternating", "mixture", "max_abs"])
def test_the_rule_does_not_matter(which, rule):
    view = which.with_rule(rule)
    with view.assigned([2, 1]):
        assert drawn(view, 2) == [2, 1]
        assert drawn(which, 2) == [2, 1]  # a view's rows are its ensemble's


def euler(model, x, scheduler, generator):
    del generator
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t), t, x).prev_sample
    return x


def ancestral(model, x, scheduler, generator):
    for t in scheduler.timesteps:
        output = model(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(output, t, x, generator=generator).prev_sample
    return x


def guided(model, x, scheduler, generator):
    for t in scheduler.timesteps:
        plain, conditional = model(torch.cat([x, x]), t).chunk(2)
        x = scheduler.step(plain + 2 * (conditional - plain), t, x, generator=generator).prev_sample
    return x


SAMPLERS = {
    "DDIM": (DDIMScheduler, euler),
    "DDPM": (DDPMScheduler, ancestral),
    "DPM++": (DPMSolverMultistepScheduler, euler),
    "Euler ancestral": (EulerAncestralDiscreteScheduler, ancestral),
    "DDIM, guided": (DDIMScheduler, guided),
}


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_unmodified_schedulers_loop_is_k_runs_of_it(name, dtype):
    kind, sample = SAMPLERS[name]
    members, rows = unets(dtype), [0, 0, 1, 1, 2, 2, 3, 3]
    ens = fastens.Ensemble(members)

    def run(model):
        scheduler = kind(num_train_timesteps=1000)
        scheduler.set_timesteps(4)
        x = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=dtype)
        with torch.no_grad():
            return sample(model, x * scheduler.init_noise_sigma, scheduler, torch.Generator().manual_seed(1))

    with ens.assigned(per_member=2):
        ours = run(lambda x, t: ens(x, t).sample)
    theirs = run(RowByRow(members, rows))
    assert ((ours - theirs).abs().max() / theirs.abs().max()).item() < {torch.float64: 1e-10, torch.float32: 1e-3}[
        dtype
    ]
    assert ens.engine == "fold"


@pytest.mark.skipif(not available(), reason="no compiled library")
def test_one_plan_serves_every_assignment():
    members = unets()
    ens, x = fastens.Ensemble(members), torch.randn(6, 1, 8, 8)
    with torch.no_grad():
        for rows in ([0, 1, 2, 3, 0, 1], [3, 3, 3, 3, 3, 3], [2, 0, 2, 1, 1, 0]):
            with ens.assigned(rows):
                torch.testing.assert_close(ens(x, 5).sample, RowByRow(members, rows)(x, 5), rtol=1e-4, atol=1e-4)
    assert len(ens.report().plans) == 1


def test_our_sampler_runs_in_it():
    schedule = fastens.schedules.VP()
    members = [randomised(small_unet, k) for k in range(K)]
    ens = fastens.Ensemble(members, prediction="epsilon")
    with ens.assigned(per_member=1):
        ours = Sampler(Denoiser(ens, schedule), "euler", steps=3)(K, (1, 8, 8), 0)
    theirs = Sampler(Denoiser(RowByRow(members, [*range(K)]), schedule, prediction="epsilon"), "euler", steps=3)
    torch.testing.assert_close(ours, theirs(K, (1, 8, 8), 0), rtol=1e-3, atol=1e-3)


def test_a_density_along_the_flow_is_that_of_the_rows_members():
    schedule, probes = fastens.schedules.VP(), torch.randn(1, K, 1, 8, 8)
    members = [randomised(small_unet, k) for k in range(K)]
    ens = fastens.Ensemble(members, prediction="epsilon")
    state, t = (torch.randn(K, 1, 8, 8), torch.zeros(K)), torch.tensor(0.5)
    with ens.assigned(per_member=1):
        ours = AugmentedFlow(Denoiser(ens, schedule), probes)(t, state)
    oracle = Denoiser(RowByRow(members, [*range(K)]), schedule, prediction="epsilon")
    torch.testing.assert_close(ours, AugmentedFlow(oracle, probes)(t, state), rtol=1e-4, atol=1e-4)


def test_gradients_reach_the_rows_members_only():
    members = [randomised(mlp, k) for k in range(K)]
    ens, x = fastens.Ensemble(members), torch.randn(3, 5, requires_grad=True)
    with ens.assigned([2, 0, 2]):
        ens(x).square().sum().backward()
    other = x.detach().requires_grad_()
    RowByRow(members, [2, 0, 2])(other).square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad)
    per_member = next(ens.parameters()).grad.flatten(1).abs().sum(1)
    assert (per_member > 0).tolist() == [True, False, True, False]


def test_no_thread_has_the_rows_of_another(which):
    found, barrier = {}, threading.Barrier(3)

    def ask(k):
        with which.assigned([k] * 2):
            barrier.wait()
            found[k] = [drawn(which, 2) for _ in range(5)]
            barrier.wait()

    def ask_outside():
        barrier.wait()
        found["outside"] = [drawn(which, 2) for _ in range(5)]
        barrier.wait()

    threads = [threading.Thread(target=ask, args=(k,)) for k in (1, 3)] + [threading.Thread(target=ask_outside)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {1: [[1, 1]] * 5, 3: [[3, 3]] * 5, "outside": [[1, 1]] * 5}


def test_no_task_has_the_rows_of_another(which):
    async def ask(k):
        with which.assigned([k]):
            await asyncio.sleep(0)
            return drawn(which, 1)

    async def all_of_them():
        return await asyncio.gather(*(ask(k) for k in range(K)))

    assert asyncio.run(all_of_them()) == [[k] for k in range(K)]


@pytest.mark.parametrize("assigned_elsewhere", [False, True])
def test_a_task_keeps_the_rows_that_it_began_with(which, assigned_elsewhere):
    """It may outlive the block that it was made in; whether another one has rows is nothing to it."""

    async def outlive():
        ended = asyncio.Event()

        async def ask():
            await ended.wait()
            return drawn(which, 2)

        with which.assigned([3, 2]):
            task = asyncio.create_task(ask())
            await asyncio.sleep(0)
        ended.set()
        if not assigned_elsewhere:
            return await task
        with which.assigned([0, 0]):
            return await task

    assert asyncio.run(outlive()) == [3, 2]


def test_no_ensemble_has_the_rows_of_another(which):
    other = copy.deepcopy(which)
    with which.assigned([3]):
        assert drawn(other, 1) == [1]
        with other.assigned([2]):
            assert (drawn(which, 1), drawn(other, 1)) == ([3], [2])


def test_all_members_are_there_for_who_asks_for_all(which):
    with torch.no_grad(), which.assigned([1, 2]):
        assert which.member_outputs(torch.zeros(2, 3))[:, 0, 0].tolist() == [0, 1, 2, 3]


def nested(which):
    with which.assigned([0]), which.assigned([0]):
        pass


def in_a_mixture(which):
    view = which.with_rule("mixture")
    with view.trajectory(1), view.assigned([0]):
        pass


def around_a_mixture(which):
    view = which.with_rule("alternating")
    with view.assigned([0]), view.trajectory(1):
        pass


def of_other_samples(which):
    with which.trajectory(2), which.assigned([0]):
        pass


def with_variance(which):
    with which.assigned([0]):
        which.forward_with_variance(torch.zeros(1, 3))


def other_batch(which):
    with which.assigned([0, 1]):
        which(torch.zeros(3, 3))


def other_count(which):
    with which.assigned([0, 1]):
        which(fastens.PerMember([torch.zeros(2, 3)] * 2))


def other_count_unassigned(which):
    which(fastens.PerMember([torch.zeros(2, 3)] * 2))


def other_guidance(which):
    with which.assigned([0, 1], guidance=2):
        which(torch.zeros(6, 3))


def compiled(which):
    torch.compiler.reset()
    folded = fastens.Ensemble([Which(k) for k in range(K)], engine="fold")
    call = torch.compile(folded, backend="eager", fullgraph=True)
    call(torch.zeros(2, 3))
    with folded.assigned([0, 1]):
        call(torch.zeros(2, 3))


def entered(*args, **kwargs):
    def enter(which):
        with which.assigned(*args, **kwargs):
            pass

    return enter


BAD = [
    (entered([0, 4]), ValueError, r"members\[1\] is 4, expected 0 to 3"),
    (entered([0, -1]), ValueError, r"members\[1\] is -1"),
    (entered(torch.tensor([0.0, 1.0])), TypeError, "torch.float32, expected int64"),
    (entered(torch.tensor([0, 1], dtype=torch.int32)), TypeError, "torch.int32, expected int64"),
    (entered([True, False]), TypeError, "torch.bool, expected int64"),
    (entered(torch.zeros(2, 2, dtype=torch.int64)), ValueError, r"members is \[2, 2\], expected \[B\]"),
    (entered(torch.zeros(0, dtype=torch.int64)), ValueError, r"members is \[0\], expected \[B\]"),
    (entered(), TypeError, "either members, the member of each row, or per_member="),
    (entered([0], per_member=1), TypeError, "either members"),
    (entered(per_member=0), ValueError, "per_member is 0, expected at least one row"),
    (entered(per_member=1.0), TypeError, "per_member is a float"),
    (entered([0], guidance=0), ValueError, "guidance is 0, expected at least one row of each sample"),
    (entered([0], guidance=2.0), TypeError, "guidance is a float"),
    (other_guidance, ValueError, "the batch has 6 rows, expected the 2 .* guidance=2 times as many"),
    (nested, RuntimeError, "already assigned"),
    (in_a_mixture, RuntimeError, "rule 'mixture' draws members for a trajectory"),
    (around_a_mixture, RuntimeError, "rule 'alternating' draws members"),
    (of_other_samples, ValueError, "the trajectory has 2 samples, and members are assigned to 1"),
    (with_variance, ValueError, "no variance over members"),
    (other_batch, ValueError, "the batch has 3 rows, expected a multiple of the 2"),
    (other_count, ValueError, "PerMember has 2 values, expected one for each of 4 members"),
    (other_count_unassigned, ValueError, "PerMember has 2 values, expected one for each of 4 members"),
    (compiled, Exception, "members are assigned to rows, which a graph cannot see"),
]


@pytest.mark.parametrize(("use", "error", "message"), BAD, ids=[message for _, _, message in BAD])
def test_bad_input_is_named_and_leaves_no_scope_behind(use, error, message, which):
    with pytest.raises(error, match=message):
        use(which)
    with which.assigned([3]):
        assert drawn(which, 1) == [3]
    assert drawn(which, 1) == [1]


@pytest.mark.parametrize("calls", [0, 1])
def test_a_compiled_ensemble_leaves_its_graph(calls, which):
    """Whether it was traced before or is while rows have members; afterwards its graph is what it was."""
    torch.compiler.reset()
    compiled = torch.compile(which, backend="eager")
    for _ in range(calls):
        assert drawn(compiled, 2) == [1, 1]
    for rows in ([3, 0], [2, 2], [3, 0]):
        with which.assigned(rows):
            assert drawn(compiled, 2) == rows
    assert drawn(compiled, 2) == [1, 1]


def test_no_recording_is_made_or_replayed_in_it(which):
    x = torch.zeros(2, 3)
    with torch.no_grad():
        which.eval()
        which.__dict__["_recorded"][which._signature(which._arguments((x,), {}))] = None  # looked at, it would fail
        with which.assigned([3, 2]):
            assert drawn(which, 2) == [3, 2]
            with pytest.raises(ValueError, match=r"leave ens\.assigned"):
                which._record((x,), {})
