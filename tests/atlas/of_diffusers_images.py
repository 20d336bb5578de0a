"""Transformers of diffusers for images."""

from functools import partial

import torch

from tests.atlas.registry import Draws, network

LATENT = {"in_channels": 4, "out_channels": 4, "num_layers": 1, "patch_size": 2}


def text(b: int, r: Draws, width: int = 8) -> dict:
    """A latent image, its time, and text."""
    return {
        "hidden_states": r(b, 4, 8, 8),
        "timestep": r.ids(1000, b),
        "encoder_hidden_states": r(b, 4, width),
    }


@network("diffusers")
def dit():
    from diffusers import DiTTransformer2DModel

    make = partial(
        DiTTransformer2DModel,
        **LATENT,
        num_attention_heads=2,
        attention_head_dim=8,
        sample_size=8,
        num_embeds_ada_norm=8,
    )
    return make, lambda b, r: {
        "hidden_states": r(b, 4, 8, 8),
        "timestep": r.ids(1000, b),
        "class_labels": r.ids(5, b),
    }


@network("diffusers")
def pixart():
    from diffusers import PixArtTransformer2DModel

    make = partial(
        PixArtTransformer2DModel,
        **{**LATENT, "out_channels": 8},
        num_attention_heads=2,
        attention_head_dim=8,
        sample_size=8,
        cross_attention_dim=16,
        caption_channels=8,
        use_additional_conditions=False,
    )
    nothing = {"resolution": None, "aspect_ratio": None}
    return make, lambda b, r: {**text(b, r), "added_cond_kwargs": nothing}


@network("diffusers")
def stable_diffusion_3():
    from diffusers import SD3Transformer2DModel

    make = partial(
        SD3Transformer2DModel,
        **{**LATENT, "num_layers": 2},
        sample_size=8,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return make, lambda b, r: {**text(b, r), "pooled_projections": r(b, 8)}


@network("diffusers")
def aura_flow():
    from diffusers import AuraFlowTransformer2DModel

    make = partial(
        AuraFlowTransformer2DModel,
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=8,
        out_channels=4,
        pos_embed_max_size=16,
    )
    return make, lambda b, r: {**text(b, r), "timestep": r.unit(b)}


@network("diffusers")
def qwen_image():
    from diffusers import QwenImageTransformer2DModel

    make = partial(
        QwenImageTransformer2DModel,
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        axes_dims_rope=(2, 2, 4),
    )
    return make, lambda b, r: {
        "hidden_states": r(b, 4, 16),
        "encoder_hidden_states": r(b, 3, 8),
        "encoder_hidden_states_mask": torch.ones(b, 3, dtype=torch.long),
        "timestep": r.unit(b),
        "img_shapes": [(1, 2, 2)] * b,
    }


@network("diffusers")
def sana():
    from diffusers import SanaTransformer2DModel

    make = partial(
        SanaTransformer2DModel,
        **{**LATENT, "patch_size": 1},
        attention_head_dim=4,
        num_attention_heads=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=8,
    )
    return make, text


@network("diffusers")
def lumina_next():
    from diffusers import LuminaNextDiT2DModel

    make = partial(
        LuminaNextDiT2DModel,
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=8,
        learn_sigma=False,
        cross_attention_dim=8,
    )
    turns = torch.polar(torch.ones(384, 384, 4), torch.linspace(0, 3, 384 * 384 * 4).view(384, 384, 4))
    return make, lambda b, r: {
        "hidden_states": r(b, 4, 8, 8),
        "timestep": r.unit(b),
        "encoder_hidden_states": r(b, 4, 8),
        "encoder_mask": torch.ones(b, 4),
        "image_rotary_emb": turns,
        "cross_attention_kwargs": {},
    }


@network("diffusers", unplanned="tolist reads values of the input")
def lumina_2():
    from diffusers import Lumina2Transformer2DModel

    make = partial(
        Lumina2Transformer2DModel,
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=2,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(32, 32, 32),
        cap_feat_dim=8,
    )
    return make, lambda b, r: {
        "hidden_states": r(b, 4, 8, 8),
        "timestep": r.unit(b),
        "encoder_hidden_states": r(b, 4, 8),
        "encoder_attention_mask": torch.ones(b, 4, dtype=torch.bool),
    }


@network("diffusers")
def hunyuan_dit():
    from diffusers import HunyuanDiT2DModel

    make = partial(
        HunyuanDiT2DModel,
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        cross_attention_dim=8,
        cross_attention_dim_t5=8,
        pooled_projection_dim=4,
        hidden_size=16,
        text_len=4,
        text_len_t5=4,
        activation_fn="gelu-approximate",
    )
    return make, lambda b, r: {
        "hidden_states": r(b, 4, 8, 8),
        "timestep": r.unit(b) * 999,
        "encoder_hidden_states": r(b, 4, 8),
        "text_embedding_mask": torch.ones(b, 4),
        "encoder_hidden_states_t5": r(b, 4, 8),
        "text_embedding_mask_t5": torch.ones(b, 4),
        "image_meta_size": torch.tensor([[64.0, 64, 16, 16, 0, 0]] * b),
        "style": torch.zeros(b, dtype=torch.long),
        "image_rotary_emb": [torch.ones(1, 8) * 0.8, torch.ones(1, 8) * 0.6],
    }


def sizes(b: int) -> dict:
    """Sizes of images, as CogView takes them."""
    return {
        "original_size": torch.tensor([[64, 64]] * b),
        "target_size": torch.tensor([[64, 64]] * b),
        "crop_coords": torch.tensor([[0, 0]] * b),
    }


@network("diffusers")
def cogview_3_plus():
    from diffusers import CogView3PlusTransformer2DModel

    make = partial(
        CogView3PlusTransformer2DModel,
        **LATENT,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=8,
        time_embed_dim=8,
        condition_dim=2,
        pos_embed_max_size=8,
        sample_size=8,
    )
    return make, lambda b, r: {**text(b, r), **sizes(b)}


@network("diffusers")
def cogview_4():
    from diffusers import CogView4Transformer2DModel

    make = partial(
        CogView4Transformer2DModel,
        **LATENT,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=8,
        time_embed_dim=8,
        condition_dim=4,
    )
    return make, lambda b, r: {**text(b, r), **sizes(b)}


@network("diffusers", looped="numpy of a tensor that differs between members")
def hidream():
    """Experts chosen by the token."""
    from diffusers import HiDreamImageTransformer2DModel

    make = partial(
        HiDreamImageTransformer2DModel,
        **LATENT,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=[8, 4],
        text_emb_dim=8,
        num_routed_experts=4,
        num_activated_experts=2,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(8, 8),
        llama_layers=(0, 1),
        force_inference_output=True,
    )
    return make, lambda b, r: {
        "hidden_states": r(b, 4, 8, 8),
        "encoder_hidden_states_t5": r(b, 4, 8),
        "encoder_hidden_states_llama3": r(2, b, 4, 4),
        "pooled_embeds": r(b, 8),
        "timesteps": r.ids(1000, b),
    }


@network("diffusers")
def z_image():
    """Takes and returns lists of images."""
    from diffusers import ZImageTransformer2DModel

    make = partial(
        ZImageTransformer2DModel,
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=16,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=1,
        n_kv_heads=1,
        cap_feat_dim=8,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    return make, lambda b, r: {
        "x": [r(4, 1, 8, 8) for _ in range(b)],
        "cap_feats": [r(4, 8) for _ in range(b)],
        "t": r.unit(b),
    }
