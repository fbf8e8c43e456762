"""Qwen-Image's transformer as one file, as ComfyUI and GGUF have it: under the names of its folder."""

from __future__ import annotations

import dataclasses

from jaxldm.checkpoints.original.layout import Component, Family, Shapes, Table, count, places
from jaxldm.models.flux_transformer_2d import PATCH
from jaxldm.models.qwen_image_transformer_2d import QwenImageTransformer2DConfig

_MODULES = ("img_in", "txt_in", "txt_norm", "time_text_embed", "transformer_blocks", "norm_out", "proj_out")


def qwen_image_table(config: QwenImageTransformer2DConfig) -> Table:
    """Published module -> its place in the file."""
    return places({name: name for name in _MODULES})


def qwen_image_config(shapes: Shapes, preset: QwenImageTransformer2DConfig) -> QwenImageTransformer2DConfig:
    """The config by its shapes; the split of a head's width among the coordinates is the preset's."""
    width, in_channels = shapes["img_in.weight"]
    (head,) = shapes["transformer_blocks.0.attn.norm_q.weight"]
    return dataclasses.replace(
        preset,
        in_channels=in_channels,
        out_channels=shapes["proj_out.weight"][0] // PATCH**2,
        num_layers=count(shapes, r"transformer_blocks\.(\d+)\."),
        attention_head_dim=head,
        num_attention_heads=width // head,
        joint_attention_dim=shapes["txt_in.weight"][1],
    )


QWEN_IMAGE = Family(
    "Qwen-Image",
    {"transformer": Component("model.diffusion_model.", qwen_image_table, qwen_image_config, "qwen-image")},
    signature="model.diffusion_model.txt_norm.",
    bare={"transformer": "txt_norm."},
    writes_bare=True,
)
