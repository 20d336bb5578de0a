"""Where do members disagree? A picture of the variance over members at every step, from the sampler's own passes.

Run: ``python examples/variance_maps.py [variance_maps.png]``
"""

import sys

import matplotlib.pyplot as plt
import torch
from diffusers import DDIMPipeline, DDIMScheduler

import fastens
from fastens.demo import member_paths
from fastens.interop.diffusers import VarianceMaps

STEPS = 10


def main(path: str) -> None:
    """Sample four digits and draw, beneath each step, the square root of the variance of its noise predictions."""
    ensemble = fastens.Ensemble(member_paths())
    pipe = DDIMPipeline(unet=ensemble, scheduler=DDIMScheduler(num_train_timesteps=1000, clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    with VarianceMaps(ensemble) as maps:
        images = pipe(4, torch.Generator().manual_seed(0), num_inference_steps=STEPS, output_type="np").images
    deviations = torch.stack(maps.steps)[:, :, 0].sqrt()  # [steps, B, H, W]
    figure, axes = plt.subplots(4, STEPS + 1, figsize=(STEPS + 2, 4))
    for i in range(4):
        for step in range(STEPS):
            shown = axes[i, step].imshow(deviations[step, i], cmap="magma", vmin=0, vmax=float(deviations.max()))
            axes[0, step].set_title(f"step {step}", fontsize=7)
        axes[i, STEPS].imshow(images[i].squeeze(), cmap="gray")
    for axis in axes.flat:
        axis.axis("off")
    figure.colorbar(shown, ax=axes, shrink=0.8, label="deviation over members")  # one scale for all steps
    figure.savefig(path, dpi=150)
    print(path)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "variance_maps.png")
