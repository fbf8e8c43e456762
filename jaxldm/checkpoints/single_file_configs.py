"""What the shapes of the tensors in an original single file say about the configs, which it does not hold.

The rest (heads, groups, activations, factors) is that of the family's preset. A `KeyError` names the tensor
that a file lacks.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from jaxldm.models.autoencoder_kl import AutoencoderKLConfig
from jaxldm.models.clip_text import CLIPTextConfig
from jaxldm.models.t5_encoder import T5EncoderConfig
from jaxldm.models.unet_2d_condition import UNet2DConditionConfig

Shapes = Mapping[str, tuple[int, ...]]  # of one component, by original name, its prefix removed
HEAD_WIDTH = 64  # of every CLIP text tower, and of the U-Nets of Stable Diffusion 2 and XL


def unet_config(shapes: Shapes, preset: UNet2DConditionConfig) -> UNet2DConditionConfig:
    """U-Net: levels end at their downsampling convolutions."""
    blocks = count(shapes, r"input_blocks\.(\d+)\.")
    ends = [n for n in range(blocks) if f"input_blocks.{n}.0.op.weight" in shapes] + [blocks]
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
        "cross_attention_dim": _first(shapes, ".attn2.to_k.weight")[1],
        "use_linear_projection": len(_first(shapes, ".1.proj_in.weight")) == 2,
        "attention_head_dim": heads if isinstance(heads, int) else tuple(c // HEAD_WIDTH for c in channels),
    }
    if "label_emb.0.0.weight" in shapes:
        found["projection_class_embeddings_input_dim"] = shapes["label_emb.0.0.weight"][1]
        if preset.addition_embed_type is None:
            found["class_embed_type"] = "projection"
    if "label_emb.weight" in shapes:
        found["num_class_embeds"] = shapes["label_emb.weight"][0]
    return dataclasses.replace(preset, **found)


def vae_config(shapes: Shapes, preset: AutoencoderKLConfig) -> AutoencoderKLConfig:
    """Autoencoder, with the preset's factors."""
    levels = range(count(shapes, r"encoder\.down\.(\d+)\."))
    attended = [f"encoder.down.{level}.attn.0.q.weight" in shapes for level in levels]
    return dataclasses.replace(
        preset,
        in_channels=shapes["encoder.conv_in.weight"][1],
        out_channels=shapes["decoder.conv_out.weight"][0],
        latent_channels=shapes["decoder.conv_in.weight"][1],
        block_out_channels=tuple(shapes[f"encoder.down.{level}.block.0.conv2.weight"][0] for level in levels),
        layers_per_block=count(shapes, r"encoder\.down\.0\.block\.(\d+)\."),
        down_block_types=tuple("AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attended),
        up_block_types=tuple("AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(attended)),
        mid_block_add_attention="encoder.mid.attn_1.q.weight" in shapes,
        use_quant_conv="quant_conv.weight" in shapes,
        use_post_quant_conv="post_quant_conv.weight" in shapes,
    )


def clip_config(shapes: Shapes, preset: CLIPTextConfig) -> CLIPTextConfig:
    """OpenAI's CLIP text tower, as transformers names it."""
    layers = "text_model.encoder.layers"
    return _text_config(
        preset,
        tokens=shapes["text_model.embeddings.token_embedding.weight"],
        positions=shapes["text_model.embeddings.position_embedding.weight"],
        inner=shapes[f"{layers}.0.mlp.fc1.weight"],
        layers=count(shapes, rf"{re.escape(layers)}\.(\d+)\."),
    )


def openclip_config(shapes: Shapes, preset: CLIPTextConfig) -> CLIPTextConfig:
    """OpenCLIP's text tower.

    A whole tower, which its projection shows, has one layer more than Stable Diffusion 2 uses: the preset
    without projection stands for what comes before that layer.
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
    """Whether the config is that of a tower with its projection."""
    return type(config) is not CLIPTextConfig


def count(shapes: Shapes, pattern: str) -> int:
    """1 + the largest number that the pattern's group has at the start of a name; 0 where none matches."""
    found = [re.match(pattern, name) for name in shapes]
    return max((1 + int(match.group(1)) for match in found if match), default=0)


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


def _first(shapes: Shapes, ending: str) -> tuple[int, ...]:
    for name, shape in shapes.items():
        if name.endswith(ending):
            return shape
    raise KeyError(f"*{ending}")


def _one_or_each(values: list[int]) -> int | tuple[int, ...]:
    return values[0] if len(set(values)) == 1 else tuple(values)


def _depth_of_levels(depths: list[int]) -> int | tuple[int, ...]:
    """One number where the levels with transformers agree, else one for each, 1 where there are none."""
    with_transformers = {depth for depth in depths if depth}
    return with_transformers.pop() if len(with_transformers) == 1 else tuple(depth or 1 for depth in depths)
