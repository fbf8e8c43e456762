"""Small random U-Nets of every kind in diffusers, for the comparison in 16 bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers
import numpy as np
import torch

from experiments.benchmarks.sixteen_bits_case import TEXT, Case, T, X, constant, each, normal

UNET = {
    "sample_size": 8,
    "norm_num_groups": 8,
    "layers_per_block": 2,
    "cross_attention_dim": 24,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 4,
}
SDXL = UNET | {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 4),
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 16 + 6 * 8,
}
IF_1 = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 6,
    "block_out_channels": (32, 64),
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "layers_per_block": 2,
    "norm_num_groups": 8,
    "act_fn": "gelu",
    "cross_attention_dim": 64,
    "encoder_hid_dim": 24,
    "encoder_hid_dim_type": "text_proj",
    "attention_head_dim": 16,
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 4,
    "resnet_time_scale_shift": "scale_shift",
    "cross_attention_norm": "group_norm",
}
IF_2 = IF_1 | {
    "in_channels": 6,
    "mid_block_scale_factor": 1 / 0.7071,
    "mid_block_only_cross_attention": True,
    "class_embed_type": "timestep",
    "resnet_skip_time_act": True,
    "resnet_out_scale_factor": 1 / 0.7071,
    "time_embedding_act_fn": "gelu",
}
K_BLOCKS = {
    "sample_size": 8,
    "in_channels": 8,
    "out_channels": 5,
    "act_fn": "gelu",
    "attention_head_dim": 16,
    "norm_num_groups": None,
    "time_cond_proj_dim": 16,
    "conv_in_kernel": 1,
    "conv_out_kernel": 1,
    "cross_attention_dim": 24,
    "layers_per_block": 2,
    "mid_block_type": None,
    "resnet_time_scale_shift": "scale_shift",
    "time_embedding_type": "fourier",
    "timestep_post_act": "gelu",
    "down_block_types": ("KDownBlock2D", "KCrossAttnDownBlock2D", "KCrossAttnDownBlock2D"),
    "up_block_types": ("KCrossAttnUpBlock2D", "KCrossAttnUpBlock2D", "KUpBlock2D"),
    "block_out_channels": (32, 64, 64),
}
SKIP_BLOCKS = {
    "sample_size": 8,
    "time_embedding_type": "fourier",
    "norm_eps": 1e-6,
    "norm_num_groups": None,
    "mid_block_scale_factor": 2**0.5,
    "block_out_channels": (32, 32, 32),
    "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D", "SkipDownBlock2D"),
    "up_block_types": ("SkipUpBlock2D", "AttnSkipUpBlock2D", "SkipUpBlock2D"),
}


def call_unet(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    added = {name: inputs.pop(name) for name in ("text_embeds", "time_ids") if name in inputs}
    return model(inputs.pop("x"), inputs.pop("t"), **inputs, added_cond_kwargs=added or None).sample


def unet(fields: Mapping[str, Any], **more: Any) -> Case:
    """A U-Net on texts."""
    x = normal(2, 8, 8, fields.get("in_channels", 4))
    inputs = each(x=x, t=T, encoder_hidden_states=TEXT, **more)
    return Case(lambda: diffusers.UNet2DConditionModel(**fields), inputs, call_unet)


UNETS = {
    "SD 1.5's U-Net": unet(UNET),
    "SD 2.1's U-Net": unet(UNET | {"use_linear_projection": True, "attention_head_dim": (2, 4)}),
    "SDXL's U-Net": unet(
        SDXL, text_embeds=normal(2, 16), time_ids=constant([[512, 384, 0, 16, 1024, 640]] * 2)
    ),
    "DeepFloyd IF, stage I": unet(IF_1),
    "DeepFloyd IF, stage II": unet(IF_2, class_labels=constant([250, 100], np.int32)),
    "UNet2DModel": Case(
        lambda: diffusers.UNet2DModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            norm_num_groups=8,
            block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            num_class_embeds=11,
        ),
        each(x=X, t=T, class_labels=constant([3, 10], np.int32)),
        lambda model, inputs: model(inputs["x"], inputs["t"], inputs["class_labels"]).sample,
    ),
    "x2 latent upscaler's U-Net": Case(
        lambda: diffusers.UNet2DConditionModel(**K_BLOCKS),
        each(
            x=normal(2, 8, 8, 8),
            t=constant([-0.5, 0.25]),
            encoder_hidden_states=TEXT,
            timestep_cond=normal(2, 16),
        ),
        call_unet,
    ),
    "NCSN++": Case(
        lambda: diffusers.UNet2DModel(**SKIP_BLOCKS),
        each(x=normal(2, 8, 8, 3), t=constant([0.5, 4.0])),
        lambda model, inputs: model(inputs["x"], inputs["t"]).sample,
    ),
}
