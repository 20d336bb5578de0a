"""Networks of other packages; those that are not installed are skipped."""

import os
from functools import partial
from unittest.mock import patch

import torch

from tests.atlas.registry import network
from tests.interop.libraries import library

SMALL = {"dim": 8, "dim_mults": (1, 2)}


@network("denoising-diffusion-pytorch")
def ddpm_unet():
    lucid = library("denoising_diffusion_pytorch")
    make = partial(lucid.Unet, **SMALL, attn_dim_head=4, attn_heads=2, self_condition=True, learned_variance=True)
    return make, lambda b, r: (r(b, 3, 8, 8), r.ids(1000, b), r(b, 3, 8, 8))


@network("denoising-diffusion-pytorch")
def ddpm_unet_1d():
    lucid = library("denoising_diffusion_pytorch")
    make = partial(lucid.Unet1D, **SMALL, attn_dim_head=4, attn_heads=2, learned_sinusoidal_cond=True)
    return make, lambda b, r: (r(b, 3, 16), r.ids(1000, b))


@network("denoising-diffusion-pytorch")
def ddpm_unet_guided():
    """Classes that are dropped are drawn by the network, so the share that is kept is given."""
    guidance = library("denoising_diffusion_pytorch.classifier_free_guidance")
    make = partial(guidance.Unet, **SMALL, num_classes=5, attn_dim_head=4, attn_heads=2, cond_drop_prob=0.0)
    return make, lambda b, r: (r(b, 3, 8, 8), r.ids(1000, b), r.ids(5, b))


KARRAS = {"dim": 8, "dim_max": 16, "num_downsamples": 1, "num_blocks_per_stage": 1, "attn_res": (4,)}


@network("denoising-diffusion-pytorch")
def karras_unet():
    """EDM2: weights normalised in the pass."""
    karras = library("denoising_diffusion_pytorch.karras_unet")
    make = partial(karras.KarrasUnet, **KARRAS, image_size=8, channels=3, num_classes=5, attn_dim_head=4)
    return make, lambda b, r: {"x": r(b, 3, 8, 8), "time": r.unit(b), "class_labels": r.ids(5, b)}


@network("denoising-diffusion-pytorch")
def karras_unet_1d():
    karras = library("denoising_diffusion_pytorch.karras_unet_1d")
    make = partial(karras.KarrasUnet1D, **KARRAS, seq_len=8, channels=3, attn_dim_head=4)
    return make, lambda b, r: (r(b, 3, 8), r.unit(b))


@network("denoising-diffusion-pytorch")
def karras_unet_3d():
    karras = library("denoising_diffusion_pytorch.karras_unet_3d")
    make = partial(karras.KarrasUnet3D, **KARRAS, image_size=8, frames=2, channels=3, attn_dim_head=4)
    return make, lambda b, r: (r(b, 3, 2, 8, 8), r.unit(b))


@network("denoising-diffusion-pytorch")
def simple_diffusion_uvit():
    simple = library("denoising_diffusion_pytorch.simple_diffusion")
    make = partial(simple.UViT, **SMALL, vit_depth=1, attn_dim_head=4, attn_heads=2)
    return make, lambda b, r: (r(b, 3, 8, 8), r.unit(b))


@network("k-diffusion")
def k_image_v1():
    models = library("k_diffusion.models")
    make = partial(
        models.ImageDenoiserModelV1,
        c_in=3,
        feats_in=8,
        depths=(1, 1),
        channels=(8, 16),
        self_attn_depths=(False, True),
        mapping_cond_dim=4,
    )
    return make, lambda b, r: (r(b, 3, 8, 8), r.unit(b), r(b, 4))


@network("k-diffusion", unplanned="change from call to call")
def k_image_transformer_v1():
    """Axial rotary positions; clamps a parameter in each pass. Not compiled inside, which takes half a minute."""
    os.environ.setdefault("K_DIFFUSION_USE_COMPILE", "0")
    models = library("k_diffusion.models.image_transformer_v1")
    make = partial(
        models.ImageTransformerDenoiserModelV1,
        n_layers=1,
        d_model=64,
        d_ff=32,
        in_features=3,
        out_features=3,
        patch_size=(2, 2),
        num_classes=5,
    )
    return make, lambda b, r: {"x": r(b, 3, 8, 8), "sigma": r.unit(b), "aug_cond": r(b, 9), "class_cond": r.ids(5, b)}


@network("torchcfm")
def cfm_mlp():
    models = library("torchcfm.models")
    return partial(models.MLP, dim=3, w=16, time_varying=True), lambda b, r: (r(b, 4),)


@network("torchcfm")
def cfm_unet():
    """guided-diffusion's network as a vector field."""
    models = library("torchcfm.models.unet")
    make = partial(
        models.UNetModel,
        dim=(1, 8, 8),
        num_channels=32,
        num_res_blocks=1,
        channel_mult=(1, 2),
        attention_resolutions="2",
        num_head_channels=16,
        class_cond=True,
        num_classes=5,
        use_scale_shift_norm=True,
        resblock_updown=True,
    )
    return make, lambda b, r: {"t": r.unit(b), "x": r(b, 1, 8, 8), "y": r.ids(5, b)}


MONAI = {
    "in_channels": 1,
    "out_channels": 1,
    "num_res_blocks": 1,
    "channels": (8, 16),
    "attention_levels": (False, True),
    "norm_num_groups": 4,
    "num_head_channels": 8,
}


@network("monai")
def monai_unet_2d():
    nets = library("monai.networks.nets.diffusion_model_unet")
    make = partial(nets.DiffusionModelUNet, **MONAI, spatial_dims=2, with_conditioning=True, cross_attention_dim=4)
    return make, lambda b, r: {"x": r(b, 1, 8, 8), "timesteps": r.ids(1000, b), "context": r(b, 2, 4)}


@network("monai")
def monai_unet_3d():
    nets = library("monai.networks.nets.diffusion_model_unet")
    make = partial(nets.DiffusionModelUNet, **MONAI, spatial_dims=3)
    return make, lambda b, r: {"x": r(b, 1, 4, 4, 4), "timesteps": r.ids(1000, b)}


@network("monai")
def monai_spade_unet():
    """Normalised by a map of labels."""
    nets = library("monai.networks.nets.spade_diffusion_model_unet")
    make = partial(nets.SPADEDiffusionModelUNet, **MONAI, spatial_dims=2, label_nc=3, spade_intermediate_channels=8)
    return make, lambda b, r: {"x": r(b, 1, 8, 8), "timesteps": r.ids(1000, b), "seg": r(b, 3, 8, 8)}


def imagen(name: str, module: str):
    """imagen-pytorch asks a hub for the width of its text encoder where it is imported."""
    from transformers import T5Config

    with patch.object(T5Config, "from_pretrained", lambda *_: T5Config(d_model=8)):
        return getattr(library(f"imagen_pytorch.{module}"), name)


IMAGEN = {
    "dim": 8,
    "text_embed_dim": 8,
    "dim_mults": (1, 2),
    "num_resnet_blocks": 1,
    "layer_attns": (False, True),
    "layer_cross_attns": (False, True),
    "attn_dim_head": 4,
    "attn_heads": 2,
    "ff_mult": 1.0,
    "max_text_len": 4,
}


@network("imagen-pytorch")
def imagen_unet():
    make = partial(imagen("Unet", "imagen_pytorch"), **IMAGEN)
    return make, lambda b, r: {
        "x": r(b, 3, 8, 8),
        "time": r.unit(b),
        "text_embeds": r(b, 4, 8),
        "text_mask": torch.ones(b, 4, dtype=torch.bool),
    }


@network("imagen-pytorch")
def imagen_unet_3d():
    make = partial(imagen("Unet3D", "imagen_video"), **IMAGEN)
    return make, lambda b, r: {"x": r(b, 3, 2, 8, 8), "time": r.unit(b), "text_embeds": r(b, 4, 8)}


@network("audio-diffusion-pytorch", own_copies=False, looped="reaches a part of its member by a closure")
def audio_unet():
    package = library("audio_diffusion_pytorch")
    make = partial(
        package.UNetV0,
        dim=1,
        in_channels=2,
        channels=[8, 16],
        factors=[1, 2],
        items=[1, 1],
        attentions=[0, 1],
        attention_features=4,
        attention_heads=2,
        modulation_features=8,
        resnet_groups=4,
    )
    return make, lambda b, r: (r(b, 2, 16), r.unit(b))


@network("azula")
def azula_unet():
    nn = library("azula.nn.unet")
    make = partial(
        nn.UNet,
        in_channels=3,
        out_channels=3,
        hid_channels=(8, 16),
        hid_blocks=(1, 1),
        mod_features=8,
        groups=4,
    )
    return make, lambda b, r: (r(b, 3, 8, 8), r(b, 8))


@network("azula")
def azula_vit():
    nn = library("azula.nn.vit")
    make = partial(
        nn.ViT,
        in_channels=3,
        out_channels=3,
        mod_features=8,
        hid_channels=16,
        hid_blocks=1,
        attention_heads=2,
        patch_size=2,
    )
    return make, lambda b, r: (r(b, 3, 8, 8), r(b, 8))


@network("azula")
def azula_dit():
    nn = library("azula.nn.dit")
    make = partial(
        nn.DiT, in_channels=3, out_channels=3, mod_features=8, hid_channels=16, hid_blocks=1, attention_heads=2
    )
    return make, lambda b, r: (r(b, 6, 3), r(b, 8))


EDM = {
    "img_resolution": 8,
    "model_channels": 32,
    "channel_mult": (1, 1),
    "num_blocks": 1,
    "attn_resolutions": (4,),
    "pretrained": None,
}


@network("deepinv")
def edm_ncsnpp():
    """EDM's DDPM++ and NCSN++."""
    models = library("deepinv.models")
    return partial(models.NCSNpp, **EDM), lambda b, r: (r(b, 3, 8, 8), r.unit(b))


@network("deepinv")
def edm_adm():
    models = library("deepinv.models")
    return partial(models.ADMUNet, **EDM, label_dim=5), lambda b, r: (r(b, 3, 8, 8), r.unit(b), r.unit(b, 5))


@network("deepinv")
def drunet():
    """A denoiser of plug-and-play methods."""
    models = library("deepinv.models")
    make = partial(models.DRUNet, in_channels=1, out_channels=1, nc=(4, 4, 8, 8), nb=1, pretrained=None)
    return make, lambda b, r: (r(b, 1, 8, 8), r.unit(b))


@network("rectified-flow-pytorch")
def rectified_flow_unet():
    flows = library("rectified_flow_pytorch.rectified_flow")
    make = partial(flows.Unet, **SMALL, attn_dim_head=4, attn_heads=2)
    return make, lambda b, r: (r(b, 3, 8, 8), r.unit(b))


@network("video-diffusion-pytorch")
def video_unet_3d():
    """Factorised attention over space and time, with rotary embedding and relative positions."""
    video = library("video_diffusion_pytorch.video_diffusion_pytorch")
    make = partial(video.Unet3D, **SMALL, attn_heads=2, attn_dim_head=32, init_kernel_size=3)
    return make, lambda b, r: (r(b, 3, 2, 8, 8), r.ids(1000, b))


@network("autoregressive-diffusion-pytorch")
def mar_head():
    """The small network of arXiv 2406.11838 that denoises one token."""
    package = library("autoregressive_diffusion_pytorch.autoregressive_diffusion")
    make = partial(package.MLP, dim_cond=8, dim_input=4, depth=2, width=16)
    return make, lambda b, r: {"noised": r(b, 4), "times": r.unit(b), "cond": r(b, 8)}


@network("egnn-pytorch")
def egnn_network():
    """Equivariant to rotations; returns features and coordinates."""
    package = library("egnn_pytorch")
    make = partial(package.EGNN_Network, depth=2, dim=8, m_dim=4, num_nearest_neighbors=0, norm_coors=True)
    return make, lambda b, r: {"feats": r(b, 5, 8), "coors": r(b, 5, 3)}
