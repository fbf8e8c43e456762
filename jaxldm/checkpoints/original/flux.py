"""FLUX.1 in its original layout: `double_blocks.N...`, `single_blocks.N...`.

Black Forest Labs publishes the transformer and the autoencoder as a file each, without prefixes; candle and
ComfyUI read them. ComfyUI's files hold all components. Queries, keys and values are one tensor; in the single
blocks, that tensor also holds the first matrix of the feed-forward. The last norm has its shift first.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxldm.checkpoints.original.autoencoder import vae
from jaxldm.checkpoints.original.layout import SWAPPED, Component, Family, Place, Shapes, Table, count, rows
from jaxldm.checkpoints.original.text_encoders import TEXT_ENCODER_COPIES, clip, t5
from jaxldm.models.flux_transformer_2d import FluxTransformer2DConfig

# The rows of linear1 in a single block: queries, keys, values, and the feed-forward of four times the width.
_LINEAR_1 = (1, 1, 1, 4)
_EMBEDDINGS = {
    "timestep_embedder": "time_in",
    "guidance_embedder": "guidance_in",
    "text_embedder": "vector_in",
}
# Of a double block: what belongs to the image, and to the text.
_STREAMS = {
    "img": {
        "norm1.linear": "mod.lin",
        "attn.to_out.0": "attn.proj",
        "ff.net.0.proj": "mlp.0",
        "ff.net.2": "mlp.2",
        "attn.norm_q.weight": "attn.norm.query_norm.scale",
        "attn.norm_k.weight": "attn.norm.key_norm.scale",
    },
    "txt": {
        "norm1_context.linear": "mod.lin",
        "attn.to_add_out": "attn.proj",
        "ff_context.net.0.proj": "mlp.0",
        "ff_context.net.2": "mlp.2",
        "attn.norm_added_q.weight": "attn.norm.query_norm.scale",
        "attn.norm_added_k.weight": "attn.norm.key_norm.scale",
    },
}
_PROJECTIONS = {"img": ("to_q", "to_k", "to_v"), "txt": ("add_q_proj", "add_k_proj", "add_v_proj")}
_SINGLE = {
    "norm.linear": "modulation.lin",
    "attn.norm_q.weight": "norm.query_norm.scale",
    "attn.norm_k.weight": "norm.key_norm.scale",
    "proj_out": "linear2",
}


def flux_table(config: FluxTransformer2DConfig) -> Table:
    """Published module or tensor -> its place in the original file."""
    table = {
        "x_embedder": Place("img_in"),
        "context_embedder": Place("txt_in"),
        "norm_out.linear": Place("final_layer.adaLN_modulation.1", SWAPPED),
        "proj_out": Place("final_layer.linear"),
    }
    for published, original in _EMBEDDINGS.items():
        for ours, theirs in (("linear_1", "in_layer"), ("linear_2", "out_layer")):
            table[f"time_text_embed.{published}.{ours}"] = Place(f"{original}.{theirs}")
    for n in range(config.num_layers):
        block, original = f"transformer_blocks.{n}", f"double_blocks.{n}"
        for stream, names in _STREAMS.items():
            for ours, theirs in names.items():
                table[f"{block}.{ours}"] = Place(f"{original}.{stream}_{theirs}")
            for part, ours in enumerate(_PROJECTIONS[stream]):
                table[f"{block}.attn.{ours}"] = Place(f"{original}.{stream}_attn.qkv", rows(part))
    for n in range(config.num_single_layers):
        block, original = f"single_transformer_blocks.{n}", f"single_blocks.{n}"
        for ours, theirs in _SINGLE.items():
            table[f"{block}.{ours}"] = Place(f"{original}.{theirs}")
        for part, ours in enumerate(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")):
            table[f"{block}.{ours}"] = Place(f"{original}.linear1", rows(part, _LINEAR_1))
    return table


def fields_by_shapes(shapes: Shapes) -> dict[str, Any]:
    """The fields that configs of FLUX.1 and FLUX.2 have in common, by the shapes of the original file."""
    width, in_channels = shapes["img_in.weight"]
    out_channels = shapes["final_layer.linear.weight"][0]
    double, single = (count(shapes, rf"{kind}_blocks\.(\d+)\.") for kind in ("double", "single"))
    head = shapes["double_blocks.0.img_attn.norm.query_norm.scale"][0]
    return {
        "in_channels": in_channels,
        "out_channels": None if out_channels == in_channels else out_channels,
        "num_layers": double,
        "num_single_layers": single,
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "guidance_embeds": "guidance_in.in_layer.weight" in shapes,
    }


def flux_config(shapes: Shapes, preset: FluxTransformer2DConfig) -> FluxTransformer2DConfig:
    """The config by its shapes; the split of a head's width among row and column is the preset's."""
    pooled = shapes["vector_in.in_layer.weight"][1]
    return dataclasses.replace(preset, **fields_by_shapes(shapes), pooled_projection_dim=pooled)


FLUX = Family(
    "FLUX",
    {
        "transformer": Component("model.diffusion_model.", flux_table, flux_config, "flux-dev"),
        "vae": vae("vae.", "flux-vae"),
        "text_encoder": clip("text_encoders.clip_l.transformer."),
        "text_encoder_2": t5("text_encoders.t5xxl.transformer."),
    },
    signature="model.diffusion_model.double_blocks.",
    bare={"transformer": "double_blocks.", "vae": "decoder.up."},
    writes_bare=True,
    ignored=TEXT_ENCODER_COPIES,
)
