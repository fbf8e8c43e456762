"""Tiny random folders of FLUX.1, written by diffusers."""

import diffusers
import torch
from reference_pipelines import shaken, text_encoder, write_tokenizer
from sd3_folders import CHANNELS, autoencoder
from t5_parts import t5_encoder, t5_tokenizer

# scheduler_config.json as published.
SCHEDULERS = {
    "dev": {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15},
    "schnell": {"shift": 1.0, "use_dynamic_shifting": False, "base_shift": 0.5, "max_shift": 1.15},
}


def write_flux(folder, name, kind=diffusers.FluxPipeline, **options):
    """A folder of FLUX.1-dev or schnell, or of another pipeline of theirs; options are the transformer's."""
    tokenizer, size = write_tokenizer(folder / "tokenizer")
    torch.manual_seed(1)
    transformer = diffusers.FluxTransformer2DModel(
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=16,
        guidance_embeds=name == "dev",
        axes_dims_rope=(2, 2, 4),
        **{"in_channels": 4 * CHANNELS} | options,
    )
    pipe = kind(
        transformer=shaken(transformer, 1, 0.1),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**SCHEDULERS[name]),
        vae=autoencoder(),
        text_encoder=text_encoder(size, 16, 5),
        tokenizer=tokenizer,
        text_encoder_2=t5_encoder(24),
        tokenizer_2=t5_tokenizer(),
    )
    pipe.save_pretrained(folder)
    return folder


def packed(latents):
    """[N, c, h, w] -> their tokens [N, h/2 w/2, 4c]."""
    count, channels, height, width = latents.shape
    return diffusers.FluxPipeline._pack_latents(latents, count, channels, height, width)
