"""The text encoders in original files: OpenAI's CLIP, OpenCLIP and T5."""

from __future__ import annotations

import dataclasses
import re

from jaxldm.checkpoints.original.layout import (
    TRANSPOSED,
    Component,
    Place,
    Shapes,
    Table,
    count,
    places,
    rows,
)
from jaxldm.models.clip_text import CLIPTextConfig
from jaxldm.models.t5_encoder import T5EncoderConfig

HEAD_WIDTH = 64  # of every CLIP text encoder
# Also in files of SD3 and FLUX: the projection of the smaller CLIP, and T5's embedding a second time.
TEXT_ENCODER_COPIES = (
    r"text_encoders\.clip_l\.transformer\.text_projection\.weight"
    r"|text_encoders\.t5xxl\.transformer\.encoder\.embed_tokens\.weight"
)
_OPENCLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def clip(prefix: str) -> Component:
    """OpenAI's CLIP without its projection."""
    return Component(prefix, clip_table, clip_config, "clip-l")


def openclip(prefix: str, preset: str) -> Component:
    """OpenCLIP."""
    return Component(prefix, openclip_table, openclip_config, preset, _unused_by_openclip)


def t5(prefix: str) -> Component:
    """The encoder of T5 XXL."""
    return Component(prefix, t5_table, t5_config, "t5-xxl")


def clip_table(config: CLIPTextConfig) -> Table:
    """OpenAI's CLIP, whose names are those of transformers."""
    return places({"text_model": "text_model"})


def clip_config(shapes: Shapes, preset: CLIPTextConfig) -> CLIPTextConfig:
    """OpenAI's CLIP."""
    layers = "text_model.encoder.layers"
    return _text_config(
        preset,
        tokens=shapes["text_model.embeddings.token_embedding.weight"],
        positions=shapes["text_model.embeddings.position_embedding.weight"],
        inner=shapes[f"{layers}.0.mlp.fc1.weight"],
        layers=count(shapes, rf"{re.escape(layers)}\.(\d+)\."),
    )


def openclip_table(config: CLIPTextConfig) -> Table:
    """OpenCLIP: queries, keys and values in one tensor; the projection multiplies from the right."""
    modules = {
        "text_model.embeddings.token_embedding": "token_embedding",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.final_layer_norm": "ln_final",
    }
    table = {"text_projection.weight": Place("text_projection", TRANSPOSED)}
    for layer in range(config.num_hidden_layers):
        published, original = f"text_model.encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        modules |= {f"{published}.{ours}": f"{original}.{theirs}" for ours, theirs in _OPENCLIP_LAYER.items()}
        for part, projection in enumerate(("q_proj", "k_proj", "v_proj")):
            for leaf in ("weight", "bias"):
                place = Place(f"{original}.attn.in_proj_{leaf}", rows(part))
                table[f"{published}.self_attn.{projection}.{leaf}"] = place
    return places(modules) | table


def openclip_config(shapes: Shapes, preset: CLIPTextConfig) -> CLIPTextConfig:
    """OpenCLIP.

    A complete text encoder, recognised by its projection, has one layer more than Stable Diffusion 2 uses;
    the preset of Stable Diffusion 2, without projection, is the part before that layer.
    """
    layers = count(shapes, r"transformer\.resblocks\.(\d+)\.")
    projection = shapes.get("text_projection")
    if projection is not None and not has_projection(preset):
        layers, projection = layers - 1, None
    config = _text_config(
        preset,
        tokens=shapes["token_embedding.weight"],
        positions=shapes["positional_embedding"],
        inner=shapes["transformer.resblocks.0.mlp.c_fc.weight"],
        layers=layers,
    )
    return config if projection is None else dataclasses.replace(config, projection_dim=projection[1])


def _unused_by_openclip(config: CLIPTextConfig) -> str | None:
    """The last layer and the projection, which Stable Diffusion 2 does not use."""
    if has_projection(config):
        return None
    return rf"transformer\.resblocks\.{config.num_hidden_layers}\.|text_projection$"


def t5_table(config: T5EncoderConfig) -> Table:
    """The encoder of T5, whose names are those of transformers."""
    return places({"shared": "shared", "encoder": "encoder"})


def t5_config(shapes: Shapes, preset: T5EncoderConfig) -> T5EncoderConfig:
    """The encoder of T5."""
    vocab_size, d_model = shapes["shared.weight"]
    attention, forward = "encoder.block.0.layer.0.SelfAttention", "encoder.block.0.layer.1.DenseReluDense"
    buckets, heads = shapes[f"{attention}.relative_attention_bias.weight"]
    return dataclasses.replace(
        preset,
        vocab_size=vocab_size,
        d_model=d_model,
        d_kv=shapes[f"{attention}.q.weight"][0] // heads,
        d_ff=shapes[f"{forward}.wo.weight"][1],
        num_layers=count(shapes, r"encoder\.block\.(\d+)\."),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
    )


def has_projection(config: CLIPTextConfig) -> bool:
    """Whether the config is that of a text encoder with its projection."""
    return type(config) is not CLIPTextConfig


def _text_config(
    preset: CLIPTextConfig, *, tokens: tuple, positions: tuple, inner: tuple, layers: int
) -> CLIPTextConfig:
    return dataclasses.replace(
        preset,
        vocab_size=tokens[0],
        hidden_size=tokens[1],
        max_position_embeddings=positions[0],
        intermediate_size=inner[0],
        num_hidden_layers=layers,
        num_attention_heads=tokens[1] // HEAD_WIDTH,
    )
