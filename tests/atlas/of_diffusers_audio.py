"""Transformers of diffusers for audio."""

from functools import partial

import torch

from tests.atlas.registry import network


@network("diffusers")
def stable_audio():
    from diffusers import StableAudioDiTModel

    make = partial(
        StableAudioDiTModel,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_attention_heads=2,
        cross_attention_dim=16,
        time_proj_dim=8,
        global_states_input_dim=8,
        cross_attention_input_dim=8,
    )
    turns = (torch.linspace(-1, 1, 9 * 4).view(9, 4), torch.linspace(1, 0, 9 * 4).view(9, 4))
    return make, lambda b, r: {
        "hidden_states": r(b, 4, 8),
        "timestep": r.unit(b),
        "encoder_hidden_states": r(b, 3, 8),
        "global_hidden_states": r(b, 1, 8),
        "rotary_embedding": turns,
    }


@network("diffusers")
def ace_step():
    """Music; a window of attention."""
    from diffusers import AceStepTransformer1DModel

    make = partial(
        AceStepTransformer1DModel,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        in_channels=12,
        audio_acoustic_hidden_dim=4,
        patch_size=2,
        sliding_window=4,
    )
    return make, lambda b, r: {
        "hidden_states": r(b, 8, 4),
        "timestep": r.unit(b),
        "timestep_r": r.unit(b),
        "encoder_hidden_states": r(b, 5, 32),
        "context_latents": r(b, 8, 8),
    }


@network("diffusers")
def longcat_audio():
    from diffusers import LongCatAudioDiTTransformer

    make = partial(
        LongCatAudioDiTTransformer,
        dit_dim=32,
        dit_depth=1,
        dit_heads=4,
        dit_text_dim=8,
        latent_dim=4,
        text_conv=False,
    )
    return make, lambda b, r: {
        "hidden_states": r(b, 8, 4),
        "encoder_hidden_states": r(b, 5, 8),
        "encoder_attention_mask": torch.ones(b, 5, dtype=torch.bool),
        "attention_mask": torch.ones(b, 8, dtype=torch.bool),
        "timestep": r.unit(b),
    }


@network("diffusers")
def t5_film():
    """Spectrogram diffusion: notes to sound."""
    from diffusers.models import T5FilmDecoder

    make = partial(
        T5FilmDecoder, input_dims=4, targets_length=8, d_model=16, num_layers=1, num_heads=2, d_kv=8, d_ff=16
    )
    return make, lambda b, r: {
        "encodings_and_masks": [(r(b, 5, 16), torch.ones(b, 5))],
        "decoder_input_tokens": r(b, 8, 4),
        "decoder_noise_time": r.unit(b),
    }
