"""The same architectures twice: jaxldm's and those of diffusers, at the same sizes.

`experiments/benchmarks/cpu.py` times them; `tests/benchmarks/test_cpu_benchmark.py` checks that with the same
weights both sides compute the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from jaxldm import models

NUM_CLASSES = 10
# The same on both sides: AdamW's rate, clipping, guidance, the weight of the KL term.
LEARNING_RATE, MAX_GRAD_NORM, GUIDANCE_SCALE, BETA = 1e-4, 1.0, 3.0, 1e-6


@dataclasses.dataclass(frozen=True)
class Pair:
    """One architecture on both sides.

    shape: (H, W, C) of its input. ours: a flax module. theirs_class, theirs_config: the torch module, made
    by `theirs()`, which is the only thing that needs PyTorch.
    batch_size, num_images: examples in a training step, and images sampled at once.
    """

    name: str
    shape: tuple[int, int, int]
    ours: nn.Module
    theirs_class: str
    theirs_config: Mapping[str, Any]
    batch_size: int
    num_images: int

    def theirs(self) -> Any:
        """The same architecture in diffusers, with the weights that it starts with."""
        import diffusers

        return getattr(diffusers, self.theirs_class)(**self.theirs_config)


def mini_unet(width: int = 1) -> Pair:
    """The demo's U-Net at 8x8x4: that of diffusers cannot go 7 -> 4 -> 7. width: divides the channels."""
    ours = models.build(
        "mini-unet",
        sample_size=8,
        block_out_channels=(48 // width, 96 // width),
        time_embedding_dim=128 // width,
        attention_head_dim=32 // width,
        norm_num_groups=8 if width == 1 else 4,
    )
    config = ours.config
    theirs = dict(
        sample_size=config.sample_size,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        block_out_channels=config.block_out_channels,
        time_embedding_dim=config.time_embedding_dim,
        layers_per_block=config.layers_per_block,
        down_block_types=config.down_block_types,
        up_block_types=config.up_block_types,
        attention_head_dim=config.attention_head_dim,
        norm_num_groups=config.norm_num_groups,
        resnet_time_scale_shift=config.resnet_time_scale_shift,
        num_class_embeds=NUM_CLASSES + 1,
    )
    return Pair("mini U-Net", (8, 8, 4), ours, "UNet2DModel", theirs, batch_size=64, num_images=64)


def tiny_dit(width: int = 1) -> Pair:
    """Tiny DiT of lecture 43.2 on 28x28x1 pixels. width: divides the hidden size."""
    ours = models.build("tiny-dit", hidden_size=128 // width)
    config = ours.config
    theirs = dict(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.hidden_size // config.num_heads,
        in_channels=config.in_channels,
        out_channels=config.in_channels,
        num_layers=config.depth,
        sample_size=config.sample_size,
        patch_size=config.patch_size,
        num_embeds_ada_norm=NUM_CLASSES,
    )
    return Pair("Tiny DiT", (28, 28, 1), ours, "DiTTransformer2DModel", theirs, batch_size=128, num_images=32)


def autoencoder(width: int = 1) -> Pair:
    """AutoencoderKL at the size of the mini autoencoder: 28x28x1 -> 7x7x4. width: divides the channels."""
    ours = models.from_config(
        models.AutoencoderKLConfig(
            sample_size=28,
            in_channels=1,
            out_channels=1,
            block_out_channels=(32 // width, 64 // width, 64 // width),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=1,
            norm_num_groups=8,
            latent_channels=4,
        )
    )
    config = ours.config
    theirs = dict(
        sample_size=config.sample_size,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        block_out_channels=config.block_out_channels,
        down_block_types=config.down_block_types,
        up_block_types=config.up_block_types,
        layers_per_block=config.layers_per_block,
        norm_num_groups=config.norm_num_groups,
        latent_channels=config.latent_channels,
    )
    return Pair("AutoencoderKL", (28, 28, 1), ours, "AutoencoderKL", theirs, batch_size=32, num_images=64)
