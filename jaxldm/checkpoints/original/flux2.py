"""FLUX.2's transformer in its original layout, as Black Forest Labs publishes it, and for ComfyUI and GGUF.

Queries, keys and values of a double block are one tensor; a single block is the same in both layouts. The
last norm has its shift first.
"""

from __future__ import annotations

import dataclasses

from jaxldm.checkpoints.original.flux import fields_by_shapes
from jaxldm.checkpoints.original.layout import SWAPPED, Component, Family, Place, Shapes, Table, rows
from jaxldm.models.flux2_transformer_2d import Flux2Transformer2DConfig

_MODULES = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "proj_out": "final_layer.linear",
}
_EMBEDDINGS = {"timestep_embedder": "time_in", "guidance_embedder": "guidance_in"}
# Of a double block: what belongs to the image, and to the text.
_STREAMS = {
    "img": {
        "attn.to_out.0": "attn.proj",
        "ff.linear_in": "mlp.0",
        "ff.linear_out": "mlp.2",
        "attn.norm_q.weight": "attn.norm.query_norm.scale",
        "attn.norm_k.weight": "attn.norm.key_norm.scale",
    },
    "txt": {
        "attn.to_add_out": "attn.proj",
        "ff_context.linear_in": "mlp.0",
        "ff_context.linear_out": "mlp.2",
        "attn.norm_added_q.weight": "attn.norm.query_norm.scale",
        "attn.norm_added_k.weight": "attn.norm.key_norm.scale",
    },
}
_PROJECTIONS = {"img": ("to_q", "to_k", "to_v"), "txt": ("add_q_proj", "add_k_proj", "add_v_proj")}
_SINGLE = {
    "attn.to_qkv_mlp_proj": "linear1",
    "attn.to_out": "linear2",
    "attn.norm_q.weight": "norm.query_norm.scale",
    "attn.norm_k.weight": "norm.key_norm.scale",
}


def flux2_table(config: Flux2Transformer2DConfig) -> Table:
    """Published module or tensor -> its place in the original file."""
    table = {ours: Place(theirs) for ours, theirs in _MODULES.items()}
    table["norm_out.linear"] = Place("final_layer.adaLN_modulation.1", SWAPPED)
    for published, original in _EMBEDDINGS.items():
        for ours, theirs in (("linear_1", "in_layer"), ("linear_2", "out_layer")):
            table[f"time_guidance_embed.{published}.{ours}"] = Place(f"{original}.{theirs}")
    for n in range(config.num_layers):
        block, original = f"transformer_blocks.{n}", f"double_blocks.{n}"
        for stream, names in _STREAMS.items():
            for ours, theirs in names.items():
                table[f"{block}.{ours}"] = Place(f"{original}.{stream}_{theirs}")
            for part, ours in enumerate(_PROJECTIONS[stream]):
                table[f"{block}.attn.{ours}"] = Place(f"{original}.{stream}_attn.qkv", rows(part))
    for n in range(config.num_single_layers):
        for ours, theirs in _SINGLE.items():
            table[f"single_transformer_blocks.{n}.{ours}"] = Place(f"single_blocks.{n}.{theirs}")
    return table


def flux2_config(shapes: Shapes, preset: Flux2Transformer2DConfig) -> Flux2Transformer2DConfig:
    """The config by its shapes; the split of a head's width among the coordinates is the preset's."""
    return dataclasses.replace(
        preset,
        **fields_by_shapes(shapes),
        timestep_guidance_channels=shapes["time_in.in_layer.weight"][1],
        mlp_ratio=shapes["double_blocks.0.img_mlp.2.weight"][1] / shapes["img_in.weight"][0],
    )


FLUX2 = Family(
    "FLUX.2",
    {"transformer": Component("model.diffusion_model.", flux2_table, flux2_config, "flux2-klein-4b")},
    signature="model.diffusion_model.double_stream_modulation_img.",
    bare={"transformer": "double_stream_modulation_img."},
    writes_bare=True,
)
