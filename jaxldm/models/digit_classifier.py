"""A small convolutional classifier, the judge of generated digits, with its loss and its augmentation."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxldm.models.config import ModelConfig, check, height_width
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

    def __post_init__(self):
        check(min(height_width(self.sample_size)) >= 4, "sample_size must be at least 4")
        check(len(self.block_out_channels) == 3, "block_out_channels must be three numbers")
        check(
            min(self.num_features, self.num_classes, *self.block_out_channels) >= 1, "sizes must be positive"
        )
        compute_dtype(self.dtype)


class DigitClassifier(nn.Module):
    """Convolutions 5x5 and 3x3 of stride 2, one 3x3, then two linear layers; SiLU between.

    Images `[B, H, W, in_channels]` in [-1, 1] -> logits `[B, num_classes]`. `features` are the 64 numbers
    of the
    last but one layer before its SiLU: nearer to a Gaussian than after it, as the Fréchet distance assumes.
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

    def features(self, x: Float[Array, "B H W C"]) -> Float[Array, "B D"]:
        chex.assert_shape(x, (None, *height_width(self.config.sample_size), self.config.in_channels))
        for convolution in (self.conv_0, self.conv_1, self.conv_2):
            x = nn.silu(convolution(x))
        return self.dense(x.reshape(x.shape[0], -1)).astype(jnp.float32)

    def features_and_logits(
        self, x: Float[Array, "B H W C"]
    ) -> tuple[Float[Array, "B D"], Float[Array, "B K"]]:
        features = self.features(x)
        return features, self.head(nn.silu(features)).astype(jnp.float32)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B K"]:
        return self.features_and_logits(x)[1]

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The shape of the images that `init` traces the model with."""
        height, width = height_width(self.config.sample_size)
        return (jax.ShapeDtypeStruct((1, height, width, self.config.in_channels), jnp.float32),)


class Augmentation(NamedTuple):
    """Largest random change of an image: rotation in degrees, share of its size, shift in pixels."""

    degrees: float = 10.0
    scale: float = 0.1
    shift: float = 2.0


LIGHT = Augmentation()


def augment(
    key: Array, images: Float[Array, "B H W C"], strength: Augmentation = LIGHT, fill: float = -1.0
) -> Float[Array, "B H W C"]:
    """Turns, scales and shifts each image by its own random amounts, with bilinear interpolation.

    Output pixel p reads the input at s R(angle) (p - centre) + centre + shift; angle, s - 1 and the two
    shifts are uniform in plus or minus `strength`. What lies outside the image is `fill`, the background.
    """
    batch, height, width, channels = images.shape
    angle, scale, down, right = jax.random.uniform(key, (4 * batch,), minval=-1.0, maxval=1.0).reshape(
        4, batch, 1, 1
    )
    angle, scale = jnp.deg2rad(strength.degrees) * angle, 1 + strength.scale * scale
    cosine, sine = scale * jnp.cos(angle), scale * jnp.sin(angle)
    centre_y, centre_x = (height - 1) / 2, (width - 1) / 2
    y = jnp.arange(height, dtype=jnp.float32).reshape(1, height, 1) - centre_y
    x = jnp.arange(width, dtype=jnp.float32).reshape(1, 1, width) - centre_x
    # A border of one pixel of `fill` on each side: clipping to it reads background, wherever the point lies.
    rows = jnp.clip(cosine * y - sine * x + strength.shift * down + centre_y + 1, 0, height + 1)
    columns = jnp.clip(sine * y + cosine * x + strength.shift * right + centre_x + 1, 0, width + 1)
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=fill)
    padded = padded.reshape(batch, (height + 2) * (width + 2), channels)
    top, left = jnp.clip(jnp.floor(rows), 0, height), jnp.clip(jnp.floor(columns), 0, width)
    lower, righter = (rows - top)[..., None], (columns - left)[..., None]
    top, left = top.astype(jnp.int32), left.astype(jnp.int32)

    def pixel(row, column):
        index = (row * (width + 2) + column).reshape(batch, height * width, 1)
        return jnp.take_along_axis(padded, index, axis=1).reshape(batch, height, width, channels)

    upper_row = (1 - righter) * pixel(top, left) + righter * pixel(top, left + 1)
    lower_row = (1 - righter) * pixel(top + 1, left) + righter * pixel(top + 1, left + 1)
    return (1 - lower) * upper_row + lower * lower_row


def classification_loss(
    key: Array,
    classify: Callable[[Float[Array, "B H W C"]], Float[Array, "B K"]],
    images: Float[Array, "B H W C"],
    labels: Int[Array, "B"],
    augmentation: Augmentation | None = LIGHT,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Returns the mean cross-entropy -log p(label | augmented image), and {"accuracy": share read right}.

    Args:
      key: draws the augmentation.
      classify: images -> logits, closed over the parameters: `lambda x: module.apply({"params": params}, x)`.
      augmentation: None trains on the images as they are.
    """
    if augmentation is not None:
        images = augment(key, images, augmentation)
    logits = classify(images)
    chex.assert_shape(logits, (labels.shape[0], None))
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss, {"accuracy": (jnp.argmax(logits, axis=-1) == labels).mean()}


PRESETS = {"digit-classifier": DigitClassifierConfig()}
