"""U-Nets of diffusers, and others of its networks that are no transformers."""

from functools import partial

import torch

from tests.atlas.registry import network

IMAGE = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 8}
LATENT = {**IMAGE, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 8, "attention_head_dim": 4}


@network("diffusers", number="timestep")
def unet_1d():
    from diffusers import UNet1DModel

    make = partial(
        UNet1DModel,
        sample_size=32,
        in_channels=2,
        out_channels=2,
        extra_in_channels=64,
        block_out_channels=(32, 32, 64),
    )
    return make, lambda b, r: {"sample": r(b, 2, 32), "timestep": r.ids(1000, b)}


@network("diffusers", number="timestep")
def unet_1d_value():
    """Of Diffuser's planner: residual temporal blocks and Mish."""
    from diffusers import UNet1DModel

    make = partial(
        UNet1DModel,
        in_channels=6,
        out_channels=6,
        block_out_channels=(8, 8, 16, 16),
        time_embedding_type="positional",
        use_timestep_embedding=True,
        flip_sin_to_cos=False,
        freq_shift=1,
        out_block_type="OutConv1DBlock",
        mid_block_type="MidResTemporalBlock1D",
        down_block_types=("DownResnetBlock1D",) * 4,
        up_block_types=("UpResnetBlock1D",) * 3,
        act_fn="mish",
    )
    return make, lambda b, r: {"sample": r(b, 6, 16), "timestep": r.ids(1000, b)}


@network("diffusers", number="timestep")
def unet_2d():
    from diffusers import UNet2DModel

    make = partial(
        UNet2DModel,
        **IMAGE,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    )
    return make, lambda b, r: {"sample": r(b, 3, 8, 8), "timestep": r.ids(1000, b)}


@network("diffusers", number="timestep")
def unet_2d_classes():
    """As ADM: scale and shift by time and class, residual blocks that resample."""
    from diffusers import UNet2DModel

    make = partial(
        UNet2DModel,
        **IMAGE,
        num_class_embeds=5,
        resnet_time_scale_shift="scale_shift",
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        attention_head_dim=4,
    )
    return make, lambda b, r: {"sample": r(b, 3, 8, 8), "timestep": r.ids(1000, b), "class_labels": r.ids(5, b)}


@network("diffusers")
def unet_2d_ncsnpp():
    """As the VE network of score_sde: Fourier features, FIR resampling and skip blocks."""
    from diffusers import UNet2DModel

    make = partial(
        UNet2DModel,
        block_out_channels=(32, 64),
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=8,
        time_embedding_type="fourier",
        down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D"),
        attention_head_dim=4,
    )
    return make, lambda b, r: {"sample": r(b, 3, 8, 8), "timestep": r.unit(b)}


@network("diffusers", number="timestep")
def unet_2d_condition():
    from diffusers import UNet2DConditionModel

    make = partial(
        UNet2DConditionModel,
        **LATENT,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    return make, lambda b, r: {
        "sample": r(b, 4, 8, 8),
        "timestep": r.ids(1000, b),
        "encoder_hidden_states": r(b, 4, 8),
    }


@network("diffusers", number="timestep")
def unet_sdxl():
    """Linear projections, and text and sizes added to the time."""
    from diffusers import UNet2DConditionModel

    make = partial(
        UNet2DConditionModel,
        **LATENT,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=32,
    )
    return make, lambda b, r: {
        "sample": r(b, 4, 8, 8),
        "timestep": r.ids(1000, b),
        "encoder_hidden_states": r(b, 4, 8),
        "added_cond_kwargs": {"text_embeds": r(b, 8), "time_ids": r.ids(64, b, 6)},
    }


@network("diffusers", number="timestep")
def unet_3d_condition():
    from diffusers import UNet3DConditionModel

    make = partial(
        UNet3DConditionModel,
        **LATENT,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    )
    return make, lambda b, r: {
        "sample": r(b, 4, 2, 8, 8),
        "timestep": r.ids(1000, b),
        "encoder_hidden_states": r(b, 4, 8),
    }


@network("diffusers", number="timestep")
def unet_motion():
    """AnimateDiff."""
    from diffusers import UNetMotionModel

    make = partial(
        UNetMotionModel,
        block_out_channels=(8, 16),
        norm_num_groups=8,
        layers_per_block=1,
        sample_size=8,
        cross_attention_dim=8,
        num_attention_heads=2,
        motion_num_attention_heads=2,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
    )
    return make, lambda b, r: {
        "sample": r(b, 4, 2, 8, 8),
        "timestep": r.ids(1000, b),
        "encoder_hidden_states": r(b * 2, 4, 8),
    }


@network("diffusers", number="timestep")
def unet_spatio_temporal():
    """Stable Video Diffusion."""
    from diffusers import UNetSpatioTemporalConditionModel

    make = partial(
        UNetSpatioTemporalConditionModel,
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=8,
        in_channels=4,
        cross_attention_dim=8,
        num_attention_heads=4,
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=12,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    )
    return make, lambda b, r: {
        "sample": r(b, 2, 4, 4, 4),
        "timestep": r.unit(b),
        "encoder_hidden_states": r(b, 1, 8),
        "added_time_ids": r.unit(b, 3),
    }


@network("diffusers", number="timestep")
def unet_i2vgen_xl():
    from diffusers import I2VGenXLUNet

    make = partial(
        I2VGenXLUNet,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=8,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    )
    return make, lambda b, r: {
        "sample": r(b, 4, 2, 8, 8),
        "timestep": r.ids(1000, b),
        "fps": r.ids(30, b),
        "image_latents": r(b, 4, 2, 8, 8),
        "image_embeddings": r(b, 8),
        "encoder_hidden_states": r(b, 4, 8),
    }


@network("diffusers")
def unet_stable_cascade():
    from diffusers import StableCascadeUNet

    make = partial(
        StableCascadeUNet,
        in_channels=4,
        out_channels=4,
        timestep_ratio_embedding_dim=8,
        conditioning_dim=8,
        block_out_channels=(8, 16),
        num_attention_heads=(2, 4),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        clip_text_pooled_in_channels=8,
    )
    return make, lambda b, r: {
        "sample": r(b, 4, 8, 8),
        "timestep_ratio": r.unit(b),
        "clip_text_pooled": r(b, 1, 8),
    }


@network("diffusers")
def uvit_amused():
    """Predicts tokens of images."""
    from diffusers import UVit2DModel

    make = partial(
        UVit2DModel,
        hidden_size=16,
        cond_embed_dim=8,
        micro_cond_encode_dim=4,
        micro_cond_embed_dim=20,
        encoder_hidden_size=8,
        vocab_size=16,
        codebook_size=12,
        in_channels=16,
        block_out_channels=16,
        num_res_blocks=1,
        block_num_heads=2,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        sample_size=8,
    )
    return make, lambda b, r: {
        "input_ids": r.ids(16, b, 8, 8),
        "encoder_hidden_states": r(b, 4, 8),
        "pooled_text_emb": r(b, 8),
        "micro_conds": r.unit(b, 5),
    }


@network("diffusers", number="timestep")
def controlnet():
    """Returns a list of residuals."""
    from diffusers import ControlNetModel

    make = partial(
        ControlNetModel,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        conditioning_embedding_out_channels=(4, 8),
    )
    return make, lambda b, r: {
        "sample": r(b, 4, 8, 8),
        "timestep": r.ids(1000, b),
        "encoder_hidden_states": r(b, 4, 8),
        "controlnet_cond": r(b, 3, 16, 16),
    }


@network("diffusers")
def autoencoder_kl():
    """Its decoder alone is drawn from; here the whole, without sampling the posterior."""
    from diffusers import AutoencoderKL

    make = partial(
        AutoencoderKL,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    return make, lambda b, r: {"sample": r(b, 3, 8, 8)}


@network("diffusers")
def dual_transformer():
    """Attention inside a U-Net as a network of its own, as Versatile Diffusion mixes two."""
    from diffusers import Transformer2DModel

    make = partial(
        Transformer2DModel,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=8,
        norm_num_groups=4,
        cross_attention_dim=8,
        num_embeds_ada_norm=1000,
        norm_type="ada_norm",
    )
    return make, lambda b, r: {
        "hidden_states": r(b, 8, 4, 4),
        "encoder_hidden_states": r(b, 4, 8),
        "timestep": r.ids(1000),
    }


@network("diffusers", number="timestep")
def prior_transformer():
    """unCLIP's prior: embeddings of images from text."""
    from diffusers import PriorTransformer

    make = partial(
        PriorTransformer,
        num_attention_heads=2,
        attention_head_dim=4,
        num_layers=2,
        embedding_dim=8,
        num_embeddings=7,
        additional_embeddings=4,
    )
    return make, lambda b, r: {
        "hidden_states": r(b, 8),
        "timestep": r.ids(1000, b),
        "proj_embedding": r(b, 8),
        "encoder_hidden_states": r(b, 7, 8),
        "attention_mask": torch.ones(b, 7, dtype=torch.bool),
    }
