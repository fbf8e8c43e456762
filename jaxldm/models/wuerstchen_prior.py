"""Wuerstchen's prior, stage C: a text -> 24x24 image embeddings of an image of 1024x1024 pixels."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxldm.models.config import ModelConfig, check
from jaxldm.models.denoising_network import UNIT_TIME, Convention
from jaxldm.models.wuerstchen_blocks import (
    AttnBlock,
    ResBlock,
    TimestepBlock,
    check_width,
    ratio_embedding,
)
from jaxldm.nn.convolution import Conv2d
from jaxldm.nn.linear import Linear, compute_dtype
from jaxldm.nn.normalization import layer_norm


@dataclasses.dataclass(frozen=True)
class WuerstchenPriorConfig(ModelConfig):
    """Config of `WuerstchenPrior`; names and defaults are those of diffusers.

    Attributes:
        c_in: channels of an image embedding.
        c: width.
        c_cond: width of the text's states.
        c_r: width of the time embedding.
        nhead: attention heads.
        depth: repetitions of ConvNeXt block, timestep, attention.
        remat: recompute each block in the backward pass, to save memory.
    """

    c_in: int = 16
    c: int = 1280
    c_cond: int = 1024
    c_r: int = 64
    depth: int = 16
    nhead: int = 16
    dropout: float = 0.1
    dtype: str = "float32"
    remat: bool = False

    published: ClassVar[bool] = True
    package: ClassVar[str] = "wuerstchen"

    def check_values(self) -> None:
        check(self.nhead >= 1, f"nhead must be 1 or more, not {self.nhead}")
        check(self.c % self.nhead == 0, f"c {self.c} cannot be split into {self.nhead} heads")
        check(self.c_r >= 4, f"c_r must be 4 or more, not {self.c_r}")
        check(self.depth > 0, f"depth must be positive, not {self.depth}")
        compute_dtype(self.dtype)


class WuerstchenPrior(nn.Module):
    """Stage C of Wuerstchen. Pernias et al. 2024, section 3.3 and figure 3."""

    config: WuerstchenPriorConfig

    convention: ClassVar[Convention] = UNIT_TIME

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B h w C"],
        t: Float[Array, " B"],
        encoder_hidden_states: Float[Array, "B T D"],
        train: bool = False,
    ) -> Float[Array, "B h w C"]:
        """Predict the noise.

        Args:
            x: `[B, h, w, c_in]`, noisy image embeddings: one per 42.67x42.67 pixels.
            t: `[B]` floating in [0, 1], 1 being noise: the published r.
            encoder_hidden_states: `[B, T, c_cond]`, the last states of CLIP's text tower.
            train: draw dropout from the rng stream "dropout".

        Returns:
            The noise in x, `[B, h, w, c_in]`, in the dtype of x: (x - a) / (|1 - b| + 1e-5) of the halves
            a, b of the last layer's output.

        Raises:
            InvalidArgumentError: another number of channels, or states of another width.
        """
        config, dtype = self.config, self.config.dtype
        check_width("channels", x, config.c_in, "prior")
        check_width("text states", encoder_hidden_states, config.c_cond, "prior")
        chex.assert_shape(t, (x.shape[0],))
        one_by_one = {"kernel_size": 1, "padding": 0, "dtype": dtype}
        time = ratio_embedding(t, config.c_r)
        condition = Linear(config.c, dtype=dtype, name="cond_mapper_0")(encoder_hidden_states)
        condition = nn.leaky_relu(condition, 0.2)
        condition = Linear(config.c, dtype=dtype, name="cond_mapper_2")(condition)

        def run(block: nn.Module, *inputs: Array | None) -> Array:
            return block(*inputs, train)

        if config.remat:
            run = nn.remat(run)

        h = Conv2d(config.c, **one_by_one, name="projection")(x)
        for i in range(0, 3 * config.depth, 3):
            h = run(ResBlock(dropout=config.dropout, dtype=dtype, name=f"blocks_{i}"), h, None)
            h = TimestepBlock(dtype, name=f"blocks_{i + 1}")(h, time)
            h = run(AttnBlock(config.nhead, config.dropout, dtype, name=f"blocks_{i + 2}"), h, condition)
        h = Conv2d(2 * config.c_in, **one_by_one, name="out_1")(layer_norm(h))
        a, b = jnp.split(h.astype(jnp.float32), 2, axis=-1)
        return ((x.astype(jnp.float32) - a) / (jnp.abs(1.0 - b) + 1e-5)).astype(x.dtype)

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes of (x, t, encoder_hidden_states) to trace the network with: those of 1024x1024 pixels."""
        shapes = ((1, 24, 24, self.config.c_in), (1,), (1, 77, self.config.c_cond))
        return tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)


PRESETS = {
    # 993,636,896 parameters: the stage C of 1 B of the paper.
    "wuerstchen-prior": WuerstchenPriorConfig(c=1536, c_cond=1280, depth=32, nhead=24),
}
