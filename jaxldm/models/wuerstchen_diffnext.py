"""Wuerstchen's decoder, stage B: image embeddings -> the latents of stage A, by diffusion."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, cast

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxldm.errors import InvalidArgumentError, shown
from jaxldm.models.config import ModelConfig, check
from jaxldm.models.denoising_network import UNIT_TIME, Convention
from jaxldm.models.wuerstchen_blocks import (
    AttnBlock,
    ResBlock,
    TimestepBlock,
    check_width,
    ratio_embedding,
)
from jaxldm.nn.convolution import Conv2d, ConvTranspose2x2
from jaxldm.nn.initialization import normal, zeros
from jaxldm.nn.linear import Linear, compute_dtype
from jaxldm.nn.normalization import layer_norm
from jaxldm.nn.pixel_shuffle import pixel_shuffle, pixel_unshuffle
from jaxldm.nn.resizing import resize_cubic

EPS = 1e-3  # the network's b is in [EPS, 1 - EPS]


@dataclasses.dataclass(frozen=True)
class WuerstchenDiffNeXtConfig(ModelConfig):
    """Config of `WuerstchenDiffNeXt`; names and defaults are those of diffusers.

    Attributes:
        c_in, c_out: channels of the latents, the same number.
        c_r: width of the time embedding.
        c_cond: width of the condition.
        clip_embd, effnet_embd: widths of the text's states and of the image embeddings, which are mapped to
            c_cond.
        c_hidden, nhead, blocks: width, attention heads and repetitions of the blocks of each level.
        level_config: the blocks of each level: "CTA" is a ConvNeXt block, the timestep, attention.
        inject_effnet: whether the blocks of a level take the image embeddings.
        dropout: one number, or one for each level.
    """

    c_in: int = 4
    c_out: int = 4
    c_r: int = 64
    patch_size: int = 2
    c_cond: int = 1024
    c_hidden: tuple[int, ...] = (320, 640, 1280, 1280)
    nhead: tuple[int, ...] = (-1, 10, 20, 20)
    blocks: tuple[int, ...] = (4, 4, 14, 4)
    level_config: tuple[str, ...] = ("CT", "CTA", "CTA", "CTA")
    inject_effnet: tuple[bool, ...] = (False, True, True, True)
    effnet_embd: int = 16
    clip_embd: int = 1024
    kernel_size: int = 3
    dropout: float | tuple[float, ...] = 0.1
    dtype: str = "float32"
    remat: bool = False

    published: ClassVar[bool] = True
    package: ClassVar[str] = "wuerstchen"

    def check_values(self) -> None:
        lists = ("nhead", "blocks", "level_config", "inject_effnet")
        for name in lists + (() if isinstance(self.dropout, int | float) else ("dropout",)):
            count = len(getattr(self, name))
            check(count == len(self.c_hidden), f"{len(self.c_hidden)} levels, but {count} {name}")
        for kinds, count, width, heads in zip(
            self.level_config, self.blocks, self.c_hidden, self.nhead, strict=True
        ):
            fits = kinds[:1] == "C" and set(kinds) <= set("CTA")
            check(fits, f"level_config must be strings of C, T and A that begin with C, got {shown(kinds)}")
            check(count > 0, f"every level needs blocks, not {count}")
            split = "A" not in kinds or (heads > 0 and width % heads == 0)
            check(split, f"c_hidden {width} cannot be split into {heads} heads")
        check(self.c_in == self.c_out, f"c_out {self.c_out} must be c_in, {self.c_in}: the output is noise")
        check(self.kernel_size % 2 == 1, f"kernel_size must be odd, not {self.kernel_size}")
        check(self.c_r >= 4, f"c_r must be 4 or more, not {self.c_r}")
        compute_dtype(self.dtype)

    def num_blocks(self) -> int:
        return sum(count * len(kinds) for count, kinds in zip(self.blocks, self.level_config, strict=True))

    @property
    def shrinks(self) -> int:
        """Divisor of both sides of the latents."""
        return self.patch_size * 2 ** (len(self.c_hidden) - 1)

    def dropout_of(self, level: int) -> float:
        """The dropout of the blocks of a level."""
        return float(self.dropout if isinstance(self.dropout, int | float) else self.dropout[level])


class _Level(nn.Module):
    """The blocks of one down or up level, submodules `0`, `1`, ..., with its change of size.

    Attributes:
        resized: "down" before the blocks, or "up" to the width `out` after them.
    """

    config: WuerstchenDiffNeXtConfig
    level: int
    resized: str | None = None
    out: int = 0

    @nn.compact
    def __call__(
        self, x: Array, time: Array, skip: Array | None, image: Array | None, text: Array | None, train
    ):
        config, level = self.config, self.level
        width, rate, dtype = config.c_hidden[level], config.dropout_of(level), config.dtype
        mapper: dict[str, Any] = {"kernel_init": zeros, "bias_init": zeros}

        def run(block: nn.Module, *inputs: Array | None) -> Array:
            return block(*inputs, train)

        if config.remat:
            run = nn.remat(run)
        place = 0
        if self.resized == "down":
            x = Conv2d(width, 2, 2, 0, dtype, name="0_1")(layer_norm(x))
            place = 1
        for kind in config.level_config[level] * config.blocks[level]:
            name, place = str(place), place + 1
            if kind == "C":
                channels = [part for part in (skip, image) if part is not None]
                extra = jnp.concatenate(channels, axis=-1) if channels else None
                x, skip = run(ResBlock(config.kernel_size, rate, dtype, name=name), x, extra), None
            elif kind == "T":
                x = TimestepBlock(dtype, **mapper, name=name)(x, time)
            else:
                x = run(AttnBlock(config.nhead[level], rate, dtype, name=name), x, text)
        if self.resized == "up":
            x = ConvTranspose2x2(self.out, dtype, use_bias=True, name=f"{place}_1")(layer_norm(x))
        return x


class WuerstchenDiffNeXt(nn.Module):
    """Stage B of Wuerstchen: a U-Net of ConvNeXt blocks. Pernias et al. 2024, section 3.2 and appendix."""

    config: WuerstchenDiffNeXtConfig

    convention: ClassVar[Convention] = UNIT_TIME

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B h w C"],
        t: Float[Array, " B"],
        image_embeddings: Float[Array, "B H W E"],
        encoder_hidden_states: Float[Array, "B T D"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B h w C"]:
        """Predict the noise.

        Args:
            x: `[B, h, w, c_in]`, noisy latents of stage A: one for each 4 pixels. Both sides divisible by
                `config.shrinks`, 16 as published.
            t: `[B]` floating in [0, 1], 1 being noise: the published r.
            image_embeddings: `[B, h', w', effnet_embd]`, of the prior or of an encoder, of any size: the
                published effnet. Zeros are the unconditional input.
            encoder_hidden_states: `[B, T, clip_embd]`, the last states of CLIP: the published clip.
            train: draw dropout from the rng stream "dropout".

        Returns:
            The noise in x, `[B, h, w, c_in]`, in the dtype of x: (x - a) / b of the halves a, b of
            the last layer's output, b in [0.001, 0.999].

        Raises:
            InvalidArgumentError: sides that cannot be halved that often, other channels or another width.
        """
        config, dtype = self.config, compute_dtype(self.config.dtype)
        _check_inputs(config, x, t, image_embeddings, encoder_hidden_states)
        time, text = ratio_embedding(t, config.c_r), encoder_hidden_states
        if text is not None:
            init: dict[str, Any] = {"kernel_init": normal(0.02), "bias_init": zeros}
            text = layer_norm(Linear(config.c_cond, dtype=config.dtype, name="clip_mapper", **init)(text))
        h = self._one_by_one(config.c_hidden[0], "embedding_1")(pixel_unshuffle(x, config.patch_size))
        h, levels, skips = layer_norm(h), len(config.c_hidden), []

        def image(number: int, level: int, size: tuple[int, int]) -> Array | None:
            if not config.inject_effnet[level]:
                return None
            resized = resize_cubic(image_embeddings, size).astype(dtype)
            return self._one_by_one(config.c_cond, f"effnet_mappers_{number}")(resized)

        size = cast(tuple[int, int], h.shape[1:3])
        for level in range(levels):
            down = "down" if level else None
            size = (size[0] // 2, size[1] // 2) if level else size
            block = _Level(config, level, down, name=f"down_blocks_{level}")
            h = block(h, time, None, image(level, level, size), text, train)
            skips.append(h)
        for number, level in enumerate(reversed(range(levels))):
            up, out = ("up", config.c_hidden[level - 1]) if level else (None, 0)
            block = _Level(config, level, up, out, name=f"up_blocks_{number}")
            skip = skips[level] if number else None
            h = block(
                h, time, skip, image(levels + number, level, cast(tuple[int, int], h.shape[1:3])), text, train
            )

        h = self._one_by_one(2 * config.c_out * config.patch_size**2, "clf_1")(layer_norm(h))
        a, b = jnp.split(pixel_shuffle(h, config.patch_size).astype(jnp.float32), 2, axis=-1)
        b = nn.sigmoid(b) * (1 - 2 * EPS) + EPS
        return ((x.astype(jnp.float32) - a) / b).astype(x.dtype)

    def _one_by_one(self, features: int, name: str) -> Conv2d:
        return Conv2d(features, kernel_size=1, padding=0, dtype=self.config.dtype, name=name)

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes of (x, t, image_embeddings, encoder_hidden_states) for 1024x1024 pixels."""
        config = self.config
        x, embeddings = (1, 256, 256, config.c_in), (1, 24, 24, config.effnet_embd)
        shapes = (x, (1,), embeddings, (1, 77, config.clip_embd))
        return tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)


def _check_inputs(config: WuerstchenDiffNeXtConfig, x, t, image_embeddings, text) -> None:
    check_width("latents", x, config.c_in, "decoder")
    check_width("image embeddings", image_embeddings, config.effnet_embd, "decoder")
    chex.assert_shape(t, (x.shape[0],))
    if text is not None:
        check_width("text states", text, config.clip_embd, "decoder")
    elif any("A" in kinds for kinds in config.level_config):
        raise InvalidArgumentError("this decoder needs a text: give encoder_hidden_states")
    height, width = x.shape[1:3]
    if height % config.shrinks or width % config.shrinks:
        raise InvalidArgumentError(
            f"latents of {height}x{width} cannot be halved on all {len(config.c_hidden)} levels: this "
            f"decoder needs multiples of {config.shrinks}"
        )


PRESETS = {
    # 1,055,365,280 parameters.
    "wuerstchen-decoder": WuerstchenDiffNeXtConfig(),
}
