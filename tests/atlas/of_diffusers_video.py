"""Transformers of diffusers for video."""

from functools import partial

import torch

from tests.atlas.registry import Draws, network

WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 8,
    "freq_dim": 16,
    "ffn_dim": 16,
    "num_layers": 1,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 32,
}


def clip(b: int, r: Draws) -> dict:
    """Latent frames, channels first, their time, and text."""
    return {
        "hidden_states": r(b, 4, 2, 8, 8),
        "timestep": r.ids(1000, b),
        "encoder_hidden_states": r(b, 4, 8),
    }


@network("diffusers")
def wan():
    from diffusers import WanTransformer3DModel

    return partial(WanTransformer3DModel, **WAN), clip


@network("diffusers")
def wan_vace():
    from diffusers import WanVACETransformer3DModel

    make = partial(WanVACETransformer3DModel, **{**WAN, "num_layers": 2}, vace_layers=[0], vace_in_channels=12)
    return make, lambda b, r: {**clip(b, r), "control_hidden_states": r(b, 12, 2, 8, 8)}


@network("diffusers")
def skyreels_v2():
    from diffusers import SkyReelsV2Transformer3DModel

    return partial(SkyReelsV2Transformer3DModel, **WAN), clip


@network("diffusers")
def latte():
    from diffusers import LatteTransformer3DModel

    make = partial(
        LatteTransformer3DModel,
        sample_size=8,
        video_length=2,
        num_layers=1,
        patch_size=2,
        attention_head_dim=4,
        num_attention_heads=2,
        caption_channels=8,
        in_channels=4,
        cross_attention_dim=8,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
    )
    return make, clip


@network("diffusers")
def cogvideox():
    from diffusers import CogVideoXTransformer3DModel

    make = partial(
        CogVideoXTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=8,
        num_layers=1,
        sample_width=8,
        sample_height=8,
        sample_frames=8,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=4,
    )
    return make, lambda b, r: {**clip(b, r), "hidden_states": r(b, 2, 4, 8, 8)}


@network("diffusers")
def consisid():
    from diffusers import ConsisIDTransformer3DModel

    make = partial(
        ConsisIDTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=8,
        num_layers=1,
        sample_width=8,
        sample_height=8,
        sample_frames=8,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=4,
        cross_attn_interval=1,
        is_train_face=True,
        cross_attn_dim_head=4,
        cross_attn_num_heads=1,
        LFE_id_dim=2,
        LFE_vit_dim=2,
        LFE_depth=5,
        LFE_dim_head=8,
        LFE_num_heads=2,
        LFE_num_id_token=1,
        LFE_num_querie=1,
        LFE_output_dim=10,
        LFE_ff_mult=1,
        LFE_num_scale=1,
    )
    return make, lambda b, r: {
        "hidden_states": r(b, 1, 4, 8, 8),
        "encoder_hidden_states": r(b, 4, 8),
        "timestep": r.ids(1000, b),
        "id_vit_hidden": [r(b, 2, 2)],
        "id_cond": r(b, 2),
    }


@network("diffusers")
def allegro():
    from diffusers import AllegroTransformer3DModel

    make = partial(
        AllegroTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        cross_attention_dim=48,
        sample_width=8,
        sample_height=8,
        sample_frames=8,
        caption_channels=8,
    )
    return make, clip


@network("diffusers", unplanned="aten.nonzero depends on the values")
def mochi():
    from diffusers import MochiTransformer3DModel

    make = partial(
        MochiTransformer3DModel,
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=8,
        time_embed_dim=4,
        max_sequence_length=4,
    )
    return make, lambda b, r: {**clip(b, r), "encoder_attention_mask": torch.ones(b, 4, dtype=torch.bool)}


@network("diffusers")
def ltx():
    from diffusers import LTXVideoTransformer3DModel

    make = partial(
        LTXVideoTransformer3DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=8,
    )
    return make, lambda b, r: {
        "hidden_states": r(b, 32, 4),
        "encoder_hidden_states": r(b, 4, 8),
        "timestep": r.ids(1000, b),
        "encoder_attention_mask": torch.ones(b, 4, dtype=torch.bool),
        "num_frames": 2,
        "height": 4,
        "width": 4,
    }


@network("diffusers")
def ltx_2():
    """Frames and sound together."""
    from diffusers import LTX2VideoTransformer3DModel

    make = partial(
        LTX2VideoTransformer3DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=1,
        caption_channels=16,
        rope_double_precision=False,
    )
    return make, lambda b, r: {
        "hidden_states": r(b, 32, 4),
        "audio_hidden_states": r(b, 5, 4),
        "encoder_hidden_states": r(b, 4, 16),
        "audio_encoder_hidden_states": r(b, 4, 16),
        "timestep": r.unit(b) * 1000,
        "encoder_attention_mask": torch.ones(b, 4, dtype=torch.bool),
        "num_frames": 2,
        "height": 4,
        "width": 4,
        "audio_num_frames": 5,
        "fps": 25.0,
    }


@network("diffusers")
def hunyuan_video():
    from diffusers import HunyuanVideoTransformer3DModel

    make = partial(
        HunyuanVideoTransformer3DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=8,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )
    return make, lambda b, r: {
        **clip(b, r),
        "pooled_projections": r(b, 8),
        "encoder_attention_mask": torch.ones(b, 4),
        "guidance": r.unit(b) * 1000,
    }


@network("diffusers")
def easy_animate():
    from diffusers import EasyAnimateTransformer3DModel

    make = partial(
        EasyAnimateTransformer3DModel,
        attention_head_dim=16,
        num_attention_heads=2,
        in_channels=4,
        out_channels=4,
        mmdit_layers=1,
        num_layers=2,
        patch_size=2,
        sample_height=60,
        sample_width=90,
        text_embed_dim=8,
        time_embed_dim=8,
        time_position_encoding_type="3d_rope",
        timestep_activation_fn="silu",
    )
    return make, clip


@network("diffusers")
def sana_video():
    from diffusers import SanaVideoTransformer3DModel

    make = partial(
        SanaVideoTransformer3DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=8,
        sample_size=8,
        patch_size=(1, 2, 2),
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    return make, clip
