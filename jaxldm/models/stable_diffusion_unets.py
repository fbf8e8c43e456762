"""The U-Nets of Stable Diffusion: presets of `UNet2DConditionModel`."""

from __future__ import annotations

import dataclasses

from jaxldm.models.unet_2d_condition import UNet2DConditionConfig

_SD_15 = UNet2DConditionConfig(sample_size=64, cross_attention_dim=768)
_SD_20 = dataclasses.replace(
    _SD_15,
    sample_size=96,
    cross_attention_dim=1024,
    attention_head_dim=(5, 10, 20, 20),
    use_linear_projection=True,
)
_SDXL = UNet2DConditionConfig(
    sample_size=128,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(320, 640, 1280),
    cross_attention_dim=2048,
    transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    upcast_attention=None,
    projection_class_embeddings_input_dim=2816,
)

PRESETS = {
    # Stable Diffusion 1.5: 860 M parameters, predicts eps.
    "sd15-unet": _SD_15,
    # Stable Diffusion 2.0 and 2.1 for 768x768 images: 866 M, predict v.
    "sd20-unet": _SD_20,
    "sd21-unet": dataclasses.replace(_SD_20, upcast_attention=True),
    # Stable Diffusion XL 1.0: 2.6 B, predicts eps; its refiner: 2.3 B.
    "sdxl-unet": _SDXL,
    "sdxl-refiner-unet": dataclasses.replace(
        _SDXL,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(384, 768, 1536, 1536),
        cross_attention_dim=1280,
        transformer_layers_per_block=4,
        attention_head_dim=(6, 12, 24, 24),
        projection_class_embeddings_input_dim=2560,
    ),
    # Latent consistency models distilled from Stable Diffusion 1.5, with a guidance embedding.
    "lcm-unet": dataclasses.replace(_SD_15, time_cond_proj_dim=256),
    # Playground v2.5: SDXL's architecture, trained in EDM's formulation.
    "playground-unet": _SDXL,
}
