"""What compositions cost: densities of all members, guidance, and a second network of another width."""

import pytest
import torch

import fastens
from bench.bench_forward import K, _unets, digits_members
from bench.contest import contest
from fastens.composition import Autoguided, Guided, compose
from fastens.composition.path import Path
from fastens.evaluation import Denoiser
from fastens.evaluation.ode import AugmentedFlow
from fastens.ops.normal import normal
from fastens.schedules import Discrete


def drawn(*shape: int) -> torch.Tensor:
    """A batch of noise."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def conditional(widths: tuple[int, int], count: int, attention: bool = True) -> list[torch.nn.Module]:
    """U-Nets with classes."""
    kind = "AttnDownBlock2D" if attention else "DownBlock2D"
    return _unets(
        count,
        sample_size=16,
        layers_per_block=1,
        block_out_channels=widths,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", kind),
        up_block_types=(kind.replace("Down", "Up"), "UpBlock2D"),
        num_class_embeds=11,
    )


@pytest.mark.parametrize("batch", [1, 16])
@torch.no_grad()
def test_densities(benchmark, batch):
    """Scores, and divergences by one probe, of every member; beside the mean's, as likelihoods take it."""
    denoiser = Denoiser(fastens.Ensemble(digits_members()), Discrete.linear())
    path = Path(denoiser, 10, None)
    y, probe = drawn(batch, 1, 8, 8).double(), normal(0, 0, torch.arange(batch), (1, 8, 8)).sign().unsqueeze(0)
    x = (path.alpha(5) * y).float()
    flow = AugmentedFlow(denoiser, probe)

    def ours():
        return path.scores_along(y, 5, probe)[1].mean(0)

    def one_density():
        _, rate = flow(path.times[5], (x, torch.zeros(batch)))
        factor, noise = denoiser.velocity_factors(x, path.times[5])
        return (rate - factor * x[0].numel()) / noise.reshape(-1)[0] * (-path.alpha(5) / float(path.ratios[5]))

    contest(
        benchmark,
        ours,
        {"one evaluation with its divergence": one_density},
        one_density(),
        1e-3,
        "G1",
        f"densities of {K} members by one probe, B={batch}",
        f"K={K}, B={batch}, digits, float32",
        {"one evaluation with its divergence": 1 / 1.5},
        rounds=60,
    )


@pytest.mark.parametrize("batch", [1, 16])
@torch.no_grad()
def test_guided(benchmark, batch):
    """Guidance of an ensemble, beside as many rows without it."""
    ensemble = fastens.Ensemble(conditional((32, 64), K))
    guided = compose(ensemble, Guided(3.0, unconditional={"class_labels": 10}))
    x, t, labels = drawn(batch, 3, 16, 16), torch.full((batch,), 500), torch.arange(batch) % 10
    both = torch.cat([x, x]), t.repeat(2), torch.cat([labels, torch.full_like(labels, 10)])

    def rows():
        cond, uncond = ensemble(*both).sample.chunk(2)
        return cond + 2 * (cond - uncond)

    contest(
        benchmark,
        lambda: guided(x, t, labels).sample,
        {"as many rows without it": rows},
        rows(),
        1e-4,
        "G2",
        f"guided ensemble, B={batch}",
        f"K={K}, B={batch}, UNet2DModel 16x16 with classes, float32",
        {"as many rows without it": 1 / 1.05},
        rounds=60,
    )


@torch.no_grad()
def test_two_widths(benchmark):
    """A strong network and a narrow one, beside calls of the modules as they are, and of an ensemble of each."""
    (strong,), (weak,) = conditional((32, 64), 1), conditional((16, 32), 1, attention=False)
    singles = [fastens.Ensemble([net]) for net in (strong, weak)]
    composed = compose(fastens.Ensemble([strong]), Autoguided(2.0, weak=weak))
    x, t, labels = drawn(1, 3, 16, 16), torch.tensor([500]), torch.tensor([3])

    def separate(nets):
        first, second = (net(x, t, labels).sample for net in nets)
        return first + (first - second)

    contest(
        benchmark,
        lambda: composed(x, t, labels).sample,
        {"two calls": lambda: separate((strong, weak)), "two planned calls": lambda: separate(singles)},
        separate((strong, weak)),
        1e-4,
        "G3",
        "autoguidance by a network of another width, B=1",
        "widths 32, 64 with attention and 16, 32 without, 16x16, B=1, float32",
        {"two calls": 1.5},
        rounds=60,
    )
