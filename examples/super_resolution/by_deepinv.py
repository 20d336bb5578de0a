"""The same patches by deepinv's posterior samplers, unmodified: DiffPIR (arXiv 2305.08995) and DPS (arXiv 2209.14687).

``pip install deepinv``, then ``python examples/super_resolution/by_deepinv.py``. The ensemble is their denoiser, so
one run of a sampler is a run of every member. Prints how well what they disagree about tells the true error (AUSE).
"""

from collections.abc import Callable

import deepinv
import torch
from run import PATCHES, SAMPLES, STEPS
from torch import Tensor, nn
from train import FOLDER, enlarged, patches, smaller

import fastens
from fastens import uncertainty
from fastens.demo.train import make_scheduler


class Denoiser(nn.Module):
    """A member as deepinv calls denoisers: images in [0, 1] under noise of deviation ``sigma``, B patches in turn.

    Args:
        network: finds the noise in what was scaled to deviation 1, beside the enlarged small patch.
        beside: [B, 1, 16, 16].
    """

    def __init__(self, network: nn.Module, beside: Tensor) -> None:
        super().__init__()
        self.network = network
        kept = make_scheduler().alphas_cumprod
        self.register_buffer("beside", beside)
        self.register_buffer("levels", ((1 - kept) / kept).sqrt())

    def forward(self, x: Tensor, sigma: Tensor | float, **_: object) -> Tensor:
        """Images without noise, [N B, 1, 16, 16]."""
        level = 2 * torch.as_tensor(sigma, dtype=x.dtype).reshape(-1)[:1]  # of images in [-1, 1]
        t = (self.levels - level).abs().argmin()
        noisy = 2 * x - 1
        given = self.beside.repeat(len(x) // len(self.beside), 1, 1, 1)
        noise = self.network(torch.cat([noisy / (1 + level**2).sqrt(), given], 1), t).sample
        return (noisy - level * noise + 1) / 2


class Smaller(deepinv.physics.LinearPhysics):
    """The mean of each 2x2 block. As A A^T = 1/4, the proximal step takes no solver, which would ask how far it is."""

    def A(self, x: Tensor, **_: object) -> Tensor:
        """[B, 1, 16, 16] to [B, 1, 8, 8]."""
        return smaller(x)

    def A_adjoint(self, y: Tensor, **_: object) -> Tensor:
        """[B, 1, 8, 8] to [B, 1, 16, 16]."""
        return enlarged(y) / 4

    def prox_l2(self, z: Tensor, y: Tensor, gamma: Tensor, *_: object, **__: object) -> Tensor:
        """(1 + gamma A^T A)^-1 (z + gamma A^T y), by Woodbury's identity."""
        right = z + gamma * self.A_adjoint(y)
        return right - gamma / (1 + gamma / 4) * self.A_adjoint(self.A(right))


def diffpir(denoiser: nn.Module, physics: deepinv.physics.Physics, y: Tensor) -> Tensor:
    """DiffPIR of measurements y, images in [0, 1]."""
    return deepinv.sampling.DiffPIR(denoiser, deepinv.optim.L2(), sigma=0.02, max_iter=STEPS, device="cpu")(y, physics)


def dps(denoiser: nn.Module, physics: deepinv.physics.Physics, y: Tensor) -> Tensor:
    """DPS of the same."""
    start = (len(y), 1, 2 * y.shape[2], 2 * y.shape[3])
    return deepinv.sampling.DPS(denoiser, num_steps=STEPS)(y, physics, x_init=start)


def main() -> None:
    """Enlarge test patches by both, and print how far they are off."""
    truth = patches()[1][:PATCHES]
    small = smaller(truth)
    members = fastens.Ensemble.from_pretrained(FOLDER).float().members
    ensemble = fastens.Ensemble([Denoiser(member, enlarged(small)) for member in members])
    physics = Smaller()

    def runs(sampler: Callable[..., Tensor]) -> Tensor:
        def sample(num: int) -> Tensor:
            found = sampler(ensemble, physics, (small.repeat(num, 1, 1, 1) + 1) / 2)
            return (2 * found - 1).unflatten(0, (num, -1))

        return fastens.sample_members(sample, None, SAMPLES, ensemble=ensemble, generator=0)

    for name, sampler in {"DiffPIR": diffpir, "DPS": dps}.items():
        samples = runs(sampler)
        error = (samples.mean((0, 1)) - truth).square()
        ause = uncertainty.sparsification(error, uncertainty.decompose(samples).total).ause
        print(f"{name}: error {error.mean().sqrt():.3f}, AUSE by total variance {ause:.3f}")


if __name__ == "__main__":
    main()
