"""The autoencoder in original files: of the latent diffusion code, which SD3, FLUX and Z-Image kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxldm import models
from jaxldm.checkpoints.original.layout import PIXELWISE, Component, Shapes, Table, count, places
from jaxldm.checkpoints.safetensors_file import Tensor
from jaxldm.models.autoencoder_kl import AutoencoderKLConfig

_ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
# Tensors of Playground v2.5 that stand outside the autoencoder, and the fields of its config.
_STATISTICS = {"edm_mean": "latents_mean", "edm_std": "latents_std"}
_FACTORS = ("scaling_factor", "shift_factor")


def vae(prefix: str, preset: str) -> Component:
    """The autoencoder of a family."""
    return Component(prefix, vae_table, vae_config, preset)


def vae_table(config: AutoencoderKLConfig) -> Table:
    """AutoencoderKL: the original decoder numbers its levels from the image inwards, as the encoder does."""
    levels = len(config.block_out_channels)
    modules, resnets, attentions = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}, {}, {}
    for coder in ("encoder", "decoder"):
        modules |= {f"{coder}.{name}": f"{coder}.{name}" for name in ("conv_in", "conv_out")}
        modules[f"{coder}.conv_norm_out"] = f"{coder}.norm_out"
        resnets |= {f"{coder}.mid_block.resnets.{i}": f"{coder}.mid.block_{i + 1}" for i in (0, 1)}
        attentions[f"{coder}.mid_block.attentions.0"] = f"{coder}.mid.attn_1"
    for level in range(levels):
        ways = (
            (f"encoder.down_blocks.{level}", f"encoder.down.{level}", config.layers_per_block),
            (f"decoder.up_blocks.{levels - 1 - level}", f"decoder.up.{level}", config.layers_per_block + 1),
        )
        for published, original, layers in ways:
            modules[f"{published}.downsamplers.0.conv"] = f"{original}.downsample.conv"
            modules[f"{published}.upsamplers.0.conv"] = f"{original}.upsample.conv"
            for layer in range(layers):
                resnets[f"{published}.resnets.{layer}"] = f"{original}.block.{layer}"
                attentions[f"{published}.attentions.{layer}"] = f"{original}.attn.{layer}"
    for published, original in resnets.items():
        modules |= {published: original, f"{published}.conv_shortcut": f"{original}.nin_shortcut"}
    for published, original in attentions.items():
        modules[f"{published}.group_norm"] = f"{original}.norm"
        modules |= {f"{published}.{ours}": f"{original}.{theirs}" for ours, theirs in _ATTENTION.items()}
    weights = {
        f"{published}.{ours}.weight": f"{original}.{theirs}.weight"
        for published, original in attentions.items()
        for ours, theirs in _ATTENTION.items()
    }
    return places(modules) | places(weights, PIXELWISE)


def vae_config(shapes: Shapes, preset: AutoencoderKLConfig) -> AutoencoderKLConfig:
    """AutoencoderKL, with the factors of the preset."""
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


def with_statistics(config: AutoencoderKLConfig, state: Mapping[str, Tensor]) -> AutoencoderKLConfig:
    """The config with the mean and standard deviation of the latents, where the file holds them."""
    if not _STATISTICS.keys() <= state.keys():
        return config
    found: dict[str, Any] = {
        field: tuple(map(float, np.asarray(state[name]).ravel())) for name, field in _STATISTICS.items()
    }
    playground: Any = models.PRESETS["playground-vae"]
    return dataclasses.replace(config, scaling_factor=playground.scaling_factor, **found)


def statistics(config: AutoencoderKLConfig) -> dict[str, np.ndarray]:
    """The tensors that `with_statistics` reads; none for an autoencoder without them."""
    values = {name: getattr(config, field) for name, field in _STATISTICS.items()}
    return {
        name: np.asarray(value, np.float32).reshape(1, -1, 1, 1)
        for name, value in values.items()
        if value is not None
    }


def factors(config: AutoencoderKLConfig) -> dict[str, str]:
    """The factors of the latents as metadata of a file: no tensor holds them."""
    values = {name: getattr(config, name) for name in _FACTORS}
    return {f"vae.{name}": repr(float(value)) for name, value in values.items() if value is not None}


def with_factors(config: AutoencoderKLConfig, metadata: Mapping[str, str]) -> AutoencoderKLConfig:
    """The config with the factors that a file's metadata holds, see `factors`; else those that it has.

    Raises:
        CheckpointError: metadata that are no numbers.
    """
    texts = {name: metadata[f"vae.{name}"] for name in _FACTORS if f"vae.{name}" in metadata}
    if not texts:
        return config
    found: dict[str, Any] = {name: float(text) for name, text in texts.items()}
    return type(config).from_dict({**config.to_dict(), "shift_factor": None, **found})


def is_of_stable_diffusion(shapes: Shapes) -> bool:
    """Whether an autoencoder alone in a file is of Stable Diffusion 1, 2 or XL, and not of FLUX or SD3.

    Those have 4 channels and the two convolutions of the latents, these 16 channels and none. Within each
    group the tensors are the same, and the factors of SD 1 and of FLUX are taken.
    """
    return "quant_conv.weight" in shapes
