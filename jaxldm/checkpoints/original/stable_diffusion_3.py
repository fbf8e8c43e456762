"""Stable Diffusion 3 and 3.5 in their original layout: `joint_blocks.N.{x,context}_block...`.

Published by Stability, read by candle and ComfyUI. Queries, keys and values are one tensor; norms with only a
scale and a shift have the shift first.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from jaxldm.checkpoints.original.autoencoder import vae
from jaxldm.checkpoints.original.layout import (
    IDENTITY,
    SWAPPED,
    Component,
    Family,
    Place,
    Shapes,
    Table,
    count,
    rows,
)
from jaxldm.checkpoints.original.text_encoders import TEXT_ENCODER_COPIES, clip_config, clip_table, t5
from jaxldm.models.clip_text import CLIPTextConfig, CLIPTextWithProjectionConfig
from jaxldm.models.sd3_transformer_2d import SD3Transformer2DConfig

_EMBEDDINGS = {"timestep_embedder": "t_embedder", "text_embedder": "y_embedder"}
# Of a block: what belongs to the image, and to the text.
_STREAMS = {
    "x_block": {
        "norm1.linear": "adaLN_modulation.1",
        "attn.to_out.0": "attn.proj",
        "attn.norm_q": "attn.ln_q",
        "attn.norm_k": "attn.ln_k",
        "attn2.to_out.0": "attn2.proj",
        "attn2.norm_q": "attn2.ln_q",
        "attn2.norm_k": "attn2.ln_k",
        "ff.net.0.proj": "mlp.fc1",
        "ff.net.2": "mlp.fc2",
    },
    "context_block": {
        "norm1_context.linear": "adaLN_modulation.1",
        "attn.to_add_out": "attn.proj",
        "attn.norm_added_q": "attn.ln_q",
        "attn.norm_added_k": "attn.ln_k",
        "ff_context.net.0.proj": "mlp.fc1",
        "ff_context.net.2": "mlp.fc2",
    },
}
_PROJECTIONS = {
    ("x_block", "attn"): ("to_q", "to_k", "to_v"),
    ("x_block", "attn2"): ("to_q", "to_k", "to_v"),
    ("context_block", "attn"): ("add_q_proj", "add_k_proj", "add_v_proj"),
}


def sd3_table(config: SD3Transformer2DConfig) -> Table:
    """Published module or tensor -> its place in the original file."""
    table = {
        "pos_embed.pos_embed": Place("pos_embed"),
        "pos_embed.proj": Place("x_embedder.proj"),
        "context_embedder": Place("context_embedder"),
        "norm_out.linear": Place("final_layer.adaLN_modulation.1", SWAPPED),
        "proj_out": Place("final_layer.linear"),
    }
    for published, original in _EMBEDDINGS.items():
        for ours, theirs in (("linear_1", "mlp.0"), ("linear_2", "mlp.2")):
            table[f"time_text_embed.{published}.{ours}"] = Place(f"{original}.{theirs}")
    for n in range(config.num_layers):
        block, original = f"transformer_blocks.{n}", f"joint_blocks.{n}"
        for stream, names in _STREAMS.items():
            for ours, theirs in names.items():
                table[f"{block}.{ours}"] = Place(f"{original}.{stream}.{theirs}")
        for (stream, attention), names in _PROJECTIONS.items():
            for part, ours in enumerate(names):
                place = Place(f"{original}.{stream}.{attention}.qkv", rows(part))
                table[f"{block}.{attention}.{ours}"] = place
    # The last block does not change the text, so that its norm has only a scale and a shift.
    last = f"transformer_blocks.{config.num_layers - 1}.norm1_context.linear"
    table[last] = table[last]._replace(form=SWAPPED)
    return table


def sd3_config(shapes: Shapes, preset: SD3Transformer2DConfig) -> SD3Transformer2DConfig:
    """The config by its shapes; where no norm shows the width of a head, it is the preset's."""
    width, in_channels, patch_size, _ = shapes["x_embedder.proj.weight"]
    layers = count(shapes, r"joint_blocks\.(\d+)\.")
    norm = shapes.get("joint_blocks.0.x_block.attn.ln_q.weight")
    head = preset.attention_head_dim if norm is None else norm[0]
    dual = [n for n in range(layers) if f"joint_blocks.{n}.x_block.attn2.qkv.weight" in shapes]
    return dataclasses.replace(
        preset,
        patch_size=patch_size,
        in_channels=in_channels,
        out_channels=shapes["final_layer.linear.weight"][0] // patch_size**2,
        num_layers=layers,
        attention_head_dim=head,
        num_attention_heads=width // head,
        joint_attention_dim=shapes["context_embedder.weight"][1],
        caption_projection_dim=width,
        pooled_projection_dim=shapes["y_embedder.mlp.0.weight"][1],
        pos_embed_max_size=math.isqrt(shapes["pos_embed"][1]),
        dual_attention_layers=tuple(dual),
        qk_norm=None if norm is None else "rms_norm",
    )


def unprojected_clip_table(config: CLIPTextWithProjectionConfig) -> Table:
    """The smaller CLIP. SD3 uses its pooled state without a projection; the published one is the identity.

    The projection of OpenAI, which some files hold, is not used.
    """
    return clip_table(config) | {"text_projection.weight": Place("text_projection.weight", IDENTITY)}


def unprojected_clip_config(shapes: Shapes, preset: CLIPTextConfig) -> CLIPTextWithProjectionConfig:
    """The smaller CLIP, with a square projection."""
    found = clip_config(shapes, preset)
    fields: dict[str, Any] = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    fields["projection_dim"] = found.hidden_size
    return CLIPTextWithProjectionConfig(**fields)


def projected_clip_table(config: CLIPTextWithProjectionConfig) -> Table:
    """The larger CLIP, whose names are those of transformers, with its projection."""
    return clip_table(config) | {"text_projection": Place("text_projection")}


def projected_clip_config(shapes: Shapes, preset: CLIPTextWithProjectionConfig) -> CLIPTextConfig:
    """The larger CLIP."""
    found = clip_config(shapes, preset)
    return dataclasses.replace(found, projection_dim=shapes["text_projection.weight"][0])


SD3 = Family(
    "SD3",
    {
        "transformer": Component("model.diffusion_model.", sd3_table, sd3_config, "sd3-medium"),
        "vae": vae("first_stage_model.", "sd3-vae"),
        "text_encoder": Component(
            "text_encoders.clip_l.transformer.", unprojected_clip_table, unprojected_clip_config, "clip-l"
        ),
        "text_encoder_2": Component(
            "text_encoders.clip_g.transformer.", projected_clip_table, projected_clip_config, "openclip-bigg"
        ),
        "text_encoder_3": t5("text_encoders.t5xxl.transformer."),
    },
    signature="model.diffusion_model.joint_blocks.",
    bare={"transformer": "joint_blocks."},
    ignored=TEXT_ENCODER_COPIES,
)
