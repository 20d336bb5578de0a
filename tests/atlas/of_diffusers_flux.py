"""Transformers of diffusers for images in the manner of Flux: tokens of text and image in one attention."""

from functools import partial

import torch

from tests.atlas.registry import Draws, network

JOINT = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 8,
}


def tokens(b: int, r: Draws, channels: int = 4, axes: int = 3) -> dict:
    """Image and text tokens with their positions, as Flux takes them."""
    places = torch.zeros(4, axes)
    places[:, 1], places[:, 2] = torch.arange(4) // 2, torch.arange(4) % 2
    return {
        "hidden_states": r(b, 4, channels),
        "encoder_hidden_states": r(b, 3, 8),
        "timestep": r.unit(b),
        "img_ids": places,
        "txt_ids": torch.zeros(3, axes),
    }


@network("diffusers")
def flux():
    from diffusers import FluxTransformer2DModel

    make = partial(
        FluxTransformer2DModel, **JOINT, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4), guidance_embeds=True
    )
    return make, lambda b, r: {**tokens(b, r), "pooled_projections": r(b, 8), "guidance": r.unit(b)}


@network("diffusers")
def flux_2():
    from diffusers import Flux2Transformer2DModel

    make = partial(Flux2Transformer2DModel, **JOINT, timestep_guidance_channels=16, axes_dims_rope=(2, 2, 2, 2))
    return make, lambda b, r: {**tokens(b, r, axes=4), "guidance": r.unit(b)}


@network("diffusers")
def chroma():
    from diffusers import ChromaTransformer2DModel

    make = partial(
        ChromaTransformer2DModel,
        **JOINT,
        axes_dims_rope=(2, 2, 4),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    return make, lambda b, r: tokens(b, r)


@network("diffusers")
def bria():
    from diffusers import BriaTransformer2DModel

    make = partial(BriaTransformer2DModel, **JOINT, pooled_projection_dim=None, axes_dims_rope=[0, 4, 4])
    return make, lambda b, r: tokens(b, r)


@network("diffusers")
def longcat_image():
    from diffusers import LongCatImageTransformer2DModel

    make = partial(LongCatImageTransformer2DModel, **JOINT, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4))
    return make, lambda b, r: tokens(b, r)


@network("diffusers")
def ovis_image():
    from diffusers import OvisImageTransformer2DModel

    make = partial(OvisImageTransformer2DModel, **JOINT, out_channels=4, axes_dims_rope=(2, 2, 4))
    return make, lambda b, r: tokens(b, r)
