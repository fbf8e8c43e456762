"""A small convolutional classifier of digits, whose features and logits the metrics use."""

from __future__ import annotations

import dataclasses

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxldm.models.config import ModelConfig, check, height_width
from jaxldm.nn.activations import silu
from jaxldm.nn.convolution import Conv2d
from jaxldm.nn.linear import Linear, compute_dtype


@dataclasses.dataclass(frozen=True)
class DigitClassifierConfig(ModelConfig):
    """Config of `DigitClassifier`; the first two channel counts each halve the image."""

    sample_size: int | tuple[int, int] = 28
    in_channels: int = 1
    block_out_channels: tuple[int, int, int] = (32, 64, 64)
    num_features: int = 64
    num_classes: int = 10
    dtype: str = "float32"

    def check_values(self) -> None:
        check(min(height_width(self.sample_size)) >= 4, "sample_size must be at least 4")
        check(len(self.block_out_channels) == 3, "block_out_channels must be three numbers")
        check(
            min(self.num_features, self.num_classes, *self.block_out_channels) >= 1, "sizes must be positive"
        )
        compute_dtype(self.dtype)


class DigitClassifier(nn.Module):
    """Convolutions 5x5 and 3x3 of stride 2, one 3x3, then two linear layers, with SiLU.

    Images `[B, H, W, in_channels]` in [-1, 1] -> logits `[B, num_classes]`. `features` are the outputs of the
    penultimate layer before its SiLU: closer to a Gaussian than after it, as the Fréchet distance assumes.
    """

    config: DigitClassifierConfig

    def setup(self):
        first, second, third = self.config.block_out_channels
        dtype = self.config.dtype
        self.conv_0 = Conv2d(first, kernel_size=5, stride=2, padding=2, dtype=dtype)
        self.conv_1 = Conv2d(second, stride=2, dtype=dtype)
        self.conv_2 = Conv2d(third, dtype=dtype)
        self.dense = Linear(self.config.num_features, dtype=dtype)
        self.head = Linear(self.config.num_classes, dtype=dtype)

    def maps(self, x: Float[Array, "B H W C"]) -> list[Float[Array, "B _ _ _"]]:
        """What the three convolutions make of images, behind their SiLU."""
        chex.assert_shape(x, (None, *height_width(self.config.sample_size), self.config.in_channels))
        found = []
        for convolution in (self.conv_0, self.conv_1, self.conv_2):
            x = silu(convolution(x))
            found.append(x)
        return found

    def features(self, x: Float[Array, "B H W C"]) -> Float[Array, "B D"]:
        last = self.maps(x)[-1]
        return self.dense(last.reshape(last.shape[0], -1)).astype(jnp.float32)

    def features_and_logits(
        self, x: Float[Array, "B H W C"]
    ) -> tuple[Float[Array, "B D"], Float[Array, "B K"]]:
        features = self.features(x)
        return features, self.head(silu(features)).astype(jnp.float32)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B K"]:
        return self.features_and_logits(x)[1]

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The shape of the images that `init` traces the model with."""
        height, width = height_width(self.config.sample_size)
        return (jax.ShapeDtypeStruct((1, height, width, self.config.in_channels), jnp.float32),)


PRESETS = {"digit-classifier": DigitClassifierConfig()}
