"""Tiny random folders of PixArt, written by diffusers."""

import diffusers
import torch
from reference_pipelines import LATENT, autoencoder, shaken
from t5_parts import t5_encoder, t5_tokenizer

# scheduler_config.json as published.
DPM = {
    "algorithm_type": "dpmsolver++",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "solver_order": 2,
    "solver_type": "midpoint",
    "lower_order_final": True,
    "timestep_spacing": "linspace",
}
KINDS = {"sigma": diffusers.PixArtSigmaPipeline, "alpha": diffusers.PixArtAlphaPipeline}


def write_pixart(folder, name="sigma"):
    """A folder of PixArt-Sigma or PixArt-alpha."""
    torch.manual_seed(1)
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        num_layers=1,
        caption_channels=16,
        sample_size=LATENT,
        interpolation_scale=2,
        use_additional_conditions=False,
    )
    if name == "alpha":  # takes the size, as its network for 1024x1024 pixels alone does
        config = dict(transformer.config) | {"sample_size": 128, "use_additional_conditions": None}
        transformer = diffusers.PixArtTransformer2DModel.from_config(config)
    kind = KINDS[name]
    kind(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder(),
        vae=autoencoder(),
        transformer=shaken(transformer, 1, 0.1),
        scheduler=diffusers.DPMSolverMultistepScheduler(**DPM),
    ).save_pretrained(folder)
    return folder
