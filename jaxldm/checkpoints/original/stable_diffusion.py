"""Stable Diffusion 1.x, 2.x, XL and the refiner of XL in the layout of the latent diffusion code."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from jaxldm.checkpoints.original.autoencoder import vae
from jaxldm.checkpoints.original.layout import Component, Family, Shapes, Table, count, first_ending, places
from jaxldm.checkpoints.original.text_encoders import clip, openclip
from jaxldm.errors import CheckpointError
from jaxldm.models.unet_2d_condition import UNet2DConditionConfig

MOST_LEVELS = 16
HEAD_WIDTH = 64  # of the U-Nets of Stable Diffusion 2 and XL
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
# The projection of OpenAI's CLIP; the statistics of Playground v2.5, which the autoencoder's config holds.
_IGNORED = (
    r"(cond_stage_model|conditioner\.embedders\.0)\.(transformer\.)?text_projection(\.weight)?|edm_(mean|std)"
)
# CLIP in files made with an early transformers, many fine-tunes of Stable Diffusion 1 among them.
_EARLY_CLIP = re.compile(r"^(cond_stage_model\.transformer\.)(?=(embeddings|encoder|final_layer_norm)\.)")


def unet_table(config: UNet2DConditionConfig) -> Table:
    """U-Net: the original counts blocks through all levels, and the layers of a block from 0."""
    modules = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "class_embedding.linear_1": "label_emb.0.0",
        "class_embedding.linear_2": "label_emb.0.2",
        "class_embedding": "label_emb",
        "conv_in": "input_blocks.0.0",
        "mid_block.attentions.0": "middle_block.1",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    resnets = {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}
    levels = len(config.block_out_channels)
    place = 1
    for level in range(levels):
        block = f"down_blocks.{level}"
        for layer in range(config.of_level("layers_per_block", level)):
            resnets[f"{block}.resnets.{layer}"] = f"input_blocks.{place}.0"
            modules[f"{block}.attentions.{layer}"] = f"input_blocks.{place}.1"
            place += 1
        modules[f"{block}.downsamplers.0.conv"] = f"input_blocks.{place}.0.op"
        place += 1
    place = 0
    for i, kind in enumerate(config.up_block_types):
        block = f"up_blocks.{i}"
        for layer in range(config.of_level("layers_per_block", levels - 1 - i) + 1):
            resnets[f"{block}.resnets.{layer}"] = f"output_blocks.{place}.0"
            modules[f"{block}.attentions.{layer}"] = f"output_blocks.{place}.1"
            place += 1
        after = 2 if kind == "CrossAttnUpBlock2D" else 1
        modules[f"{block}.upsamplers.0.conv"] = f"output_blocks.{place - 1}.{after}.conv"
    for published, original in resnets.items():
        modules |= {f"{published}.{ours}": f"{original}.{theirs}" for ours, theirs in _RESNET.items()}
    return places(modules)


def unet_config(shapes: Shapes, preset: UNet2DConditionConfig) -> UNet2DConditionConfig:
    """U-Net: a level ends at its downsampling convolution."""
    blocks = count(shapes, r"input_blocks\.(\d+)\.")
    ends = [n for n in range(blocks) if f"input_blocks.{n}.0.op.weight" in shapes] + [blocks]
    if len(ends) > MOST_LEVELS:
        raise CheckpointError(f"a U-Net of {len(ends)} levels; at most {MOST_LEVELS} are known")
    starts = [1, *(end + 1 for end in ends[:-1])]
    channels = tuple(shapes[f"input_blocks.{start}.0.out_layers.3.weight"][0] for start in starts)
    depths = [count(shapes, rf"input_blocks\.{start}\.1\.transformer_blocks\.(\d+)\.") for start in starts]
    layers = _one_or_each([end - start for start, end in zip(starts, ends, strict=True)])
    heads = preset.attention_head_dim
    found: dict[str, Any] = {
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "block_out_channels": channels,
        "layers_per_block": layers,
        "down_block_types": tuple("CrossAttnDownBlock2D" if d else "DownBlock2D" for d in depths),
        "up_block_types": tuple("CrossAttnUpBlock2D" if d else "UpBlock2D" for d in reversed(depths)),
        "transformer_layers_per_block": _depth_of_levels(depths),
        "cross_attention_dim": first_ending(shapes, ".attn2.to_k.weight")[1],
        "use_linear_projection": len(first_ending(shapes, ".1.proj_in.weight")) == 2,
        "attention_head_dim": heads if isinstance(heads, int) else tuple(c // HEAD_WIDTH for c in channels),
    }
    if "label_emb.0.0.weight" in shapes:
        found["projection_class_embeddings_input_dim"] = shapes["label_emb.0.0.weight"][1]
        if preset.addition_embed_type is None:
            found["class_embed_type"] = "projection"
    if "label_emb.weight" in shapes:
        found["num_class_embeds"] = shapes["label_emb.weight"][0]
    return dataclasses.replace(preset, **found)


def _one_or_each(values: list[int]) -> int | tuple[int, ...]:
    return values[0] if len(set(values)) == 1 else tuple(values)


def _depth_of_levels(depths: list[int]) -> int | tuple[int, ...]:
    """One number where the levels with transformers agree, else one for each, 1 where there are none."""
    with_transformers = {depth for depth in depths if depth}
    return with_transformers.pop() if len(with_transformers) == 1 else tuple(depth or 1 for depth in depths)


def _with_current_clip(name: str) -> str:
    return _EARLY_CLIP.sub(r"\1text_model.", name)


def _family(name: str, unet: str, autoencoder: str, **text_encoders: Component) -> Family:
    components = {
        "unet": Component("model.diffusion_model.", unet_table, unet_config, unet),
        "vae": vae("first_stage_model.", autoencoder),
        **text_encoders,
    }
    return Family(name, components, ignored=_IGNORED, rename=_with_current_clip)


SD1 = _family("1.x", "sd15-unet", "sd-vae", text_encoder=clip("cond_stage_model.transformer."))
SD2 = _family("2.x", "sd21-unet", "sd-vae", text_encoder=openclip("cond_stage_model.model.", "openclip-h"))
SDXL = _family(
    "XL",
    "sdxl-unet",
    "sdxl-vae",
    text_encoder=clip("conditioner.embedders.0.transformer."),
    text_encoder_2=openclip("conditioner.embedders.1.model.", "openclip-bigg"),
)
SDXL_REFINER = _family(
    "XL refiner",
    "sdxl-refiner-unet",
    "sdxl-vae",
    text_encoder_2=openclip("conditioner.embedders.0.model.", "openclip-bigg"),
)
