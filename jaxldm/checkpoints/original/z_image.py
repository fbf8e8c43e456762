"""Z-Image in the layout that ComfyUI reads: the transformer and the text encoder Qwen3.

Queries, keys and values are one tensor, and names do not hold the patch size.
"""

from __future__ import annotations

import dataclasses

from jaxldm.checkpoints.original.autoencoder import vae
from jaxldm.checkpoints.original.layout import Component, Family, Place, Shapes, Table, count, places, rows
from jaxldm.models.qwen3 import Qwen3Config
from jaxldm.models.z_image_transformer_2d import ZImageTransformer2DConfig

_SAME_NAMES = ("t_embedder", "cap_embedder", "x_pad_token", "cap_pad_token")
_ATTENTION = {"to_out.0": "out", "norm_q": "q_norm", "norm_k": "k_norm"}


def z_image_table(config: ZImageTransformer2DConfig) -> Table:
    """Published module or tensor -> its place in the original file."""
    table = places({name: name for name in _SAME_NAMES})
    for published, original in (("all_x_embedder", "x_embedder"), ("all_final_layer", "final_layer")):
        table[f"{published}.{config.patch_size}-1"] = Place(original)
    refiners = config.n_refiner_layers
    counts = {"noise_refiner": refiners, "context_refiner": refiners, "layers": config.n_layers}
    for blocks, number in counts.items():
        table[blocks] = Place(blocks)
        for attention in (f"{blocks}.{n}.attention" for n in range(number)):
            for ours, theirs in _ATTENTION.items():
                table[f"{attention}.{ours}"] = Place(f"{attention}.{theirs}")
            for part, ours in enumerate(("to_q", "to_k", "to_v")):
                table[f"{attention}.{ours}"] = Place(f"{attention}.qkv", rows(part))
    return table


def z_image_config(shapes: Shapes, preset: ZImageTransformer2DConfig) -> ZImageTransformer2DConfig:
    """The config by its shapes; the split of a head's width among the axes is the preset's."""
    dim, patch = shapes["x_embedder.weight"]
    (head,) = shapes.get("layers.0.attention.q_norm.weight", (sum(preset.axes_dims),))
    return dataclasses.replace(
        preset,
        in_channels=patch // preset.patch_size**2,
        dim=dim,
        n_layers=count(shapes, r"layers\.(\d+)\."),
        n_refiner_layers=count(shapes, r"noise_refiner\.(\d+)\."),
        n_heads=dim // head,
        n_kv_heads=dim // head,
        qk_norm="layers.0.attention.q_norm.weight" in shapes,
        cap_feat_dim=shapes["cap_embedder.1.weight"][1],
    )


def qwen3_table(config: Qwen3Config) -> Table:
    """Qwen3, whose names are those within the whole language model."""
    return places({name: f"model.{name}" for name in ("embed_tokens", "layers", "norm")})


def qwen3_config(shapes: Shapes, preset: Qwen3Config) -> Qwen3Config:
    """The config by its shapes."""
    vocab_size, hidden_size = shapes["model.embed_tokens.weight"]
    attention = "model.layers.0.self_attn"
    (head,) = shapes[f"{attention}.q_norm.weight"]
    return dataclasses.replace(
        preset,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=shapes["model.layers.0.mlp.up_proj.weight"][0],
        num_hidden_layers=count(shapes, r"model\.layers\.(\d+)\."),
        num_attention_heads=shapes[f"{attention}.q_proj.weight"][0] // head,
        num_key_value_heads=shapes[f"{attention}.k_proj.weight"][0] // head,
        head_dim=head,
        attention_bias=f"{attention}.q_proj.bias" in shapes,
    )


Z_IMAGE = Family(
    "Z-Image",
    {
        "transformer": Component("model.diffusion_model.", z_image_table, z_image_config, "z-image"),
        "vae": vae("vae.", "flux-vae"),
        "text_encoder": Component(
            "text_encoders.qwen3_4b.transformer.", qwen3_table, qwen3_config, "qwen3-4b"
        ),
    },
    signature="model.diffusion_model.cap_pad_token",
    bare={"transformer": "cap_pad_token"},
    writes_bare=True,
    ignored=(
        r"(model\.diffusion_model\.)?norm_final\.weight"
        r"|text_encoders\.qwen3_4b\.transformer\.lm_head\.weight"
    ),
)
