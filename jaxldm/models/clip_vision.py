"""The image tower of CLIP and the preparation of its images, for CLIP score."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from jaxldm.arguments import array, checked, count
from jaxldm.errors import InvalidArgumentError, one_of
from jaxldm.models.config import check, check_heads
from jaxldm.models.text_encoder import POSITION_NUMBERS, TransformersConfig, pre_norm_encoder
from jaxldm.nn.activations import ACTIVATIONS
from jaxldm.nn.embeddings import PatchProjection
from jaxldm.nn.initialization import normal, parameter
from jaxldm.nn.linear import Embedding, Linear, compute_dtype
from jaxldm.nn.normalization import LayerNorm
from jaxldm.pixels import as_pixels


class ImageEncoding(NamedTuple):
    """The output of an image encoder.

    Attributes:
        last_hidden_state: `[B, 1 + N, D]`, the class token and then the patches row by row, not normalised.
        pooled: `[B, D]`, the class token, normalised.
        image_embeds: `[B, P]`, its projection to the space that images share with texts.
        hidden_states: the embeddings, then the output of every layer, each `[B, 1 + N, D]`.
    """

    last_hidden_state: Float[Array, "B N D"]
    pooled: Float[Array, "B D"]
    image_embeds: Float[Array, "B P"]
    hidden_states: tuple[Float[Array, "B N D"], ...]


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig(TransformersConfig):
    """Config of `CLIPVisionModelWithProjection`; names and defaults are those of transformers."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    dtype: str = "float32"

    model_type: ClassVar[str] = "clip_vision_model"

    def check_values(self) -> None:
        check_heads(self.hidden_size, self.num_attention_heads)
        check(
            self.image_size % self.patch_size == 0,
            f"images of {self.image_size} cannot be cut into whole patches of {self.patch_size}",
        )
        one_of("activation", self.hidden_act, ACTIVATIONS)
        compute_dtype(self.dtype)


class CLIPVisionEmbeddings(nn.Module):
    """Images `[B, H, W, C]` -> class token and patches, positions added, `[B, 1 + N, D]`."""

    config: CLIPVisionConfig

    @nn.compact
    def __call__(self, pixel_values: Float[Array, "B H W C"]) -> Float[Array, "B N D"]:
        config = self.config
        width, init = config.hidden_size, normal(0.02)
        patches = PatchProjection(
            width,
            config.patch_size,
            config.dtype,
            use_bias=False,
            kernel_init=init,
            name="patch_embedding",
        )(pixel_values)
        token = parameter(self, "class_embedding", normal(width**-0.5), (width,)).astype(patches.dtype)
        token = jnp.broadcast_to(token[None, None], (patches.shape[0], 1, width))
        x = jnp.concatenate([token, patches], axis=1)
        positions = Embedding(x.shape[1], width, config.dtype, init, name="position_embedding")
        return x + positions(jnp.arange(x.shape[1]))[None]


class CLIPVisionTransformer(nn.Module):
    """Images -> hidden states and the normalised class token. Radford et al. 2021, section 2.4."""

    config: CLIPVisionConfig

    @nn.compact
    def __call__(self, pixel_values: Float[Array, "B H W C"]) -> tuple[tuple[Array, ...], Array]:
        config = self.config
        embedded = CLIPVisionEmbeddings(config, name="embeddings")(pixel_values)
        # The name in the published checkpoints, misspelt.
        embedded = LayerNorm(config.layer_norm_eps, config.dtype, name="pre_layrnorm")(embedded)
        states = pre_norm_encoder(config, name="encoder")(embedded)
        norm = LayerNorm(config.layer_norm_eps, config.dtype, name="post_layernorm")
        return states, norm(states[-1][:, 0])


def check_pixels(pixel_values: Float[Array, "B H W C"], config: CLIPVisionConfig) -> None:
    """Raise `InvalidArgumentError` unless the images have the size and channels of the config."""
    wanted = (config.image_size, config.image_size, config.num_channels)
    if pixel_values.ndim != 4 or pixel_values.shape[1:] != wanted:
        raise InvalidArgumentError(
            f"pixel_values must be [B, {', '.join(map(str, wanted))}], not {pixel_values.shape}: "
            "make them with clip_pixel_values(images, image_size)"
        )


class CLIPVisionModelWithProjection(nn.Module):
    """CLIP's image tower, a vision transformer. Radford et al. 2021; Dosovitskiy et al. 2021.

    Call: pixel_values `[B, image_size, image_size, 3]` made by `clip_pixel_values` ->
    `ImageEncoding` in `config.dtype`. `image_embeds` is not normalised.

    Raises:
        InvalidArgumentError: images of another size or number of channels.
    """

    config: CLIPVisionConfig

    ignored_tensors: ClassVar[tuple[str, ...]] = POSITION_NUMBERS

    @nn.compact
    def __call__(self, pixel_values: Float[Array, "B H W C"]) -> ImageEncoding:
        config = self.config
        check_pixels(pixel_values, config)
        states, pooled = CLIPVisionTransformer(config, name="vision_model")(pixel_values)
        init = normal(config.hidden_size**-0.5)
        project = Linear(config.projection_dim, False, config.dtype, init, name="visual_projection")
        return ImageEncoding(states[-1], pooled, project(pooled), states)

    def example_inputs(self) -> tuple:
        """The shape of the images that `init` traces the model with."""
        config = self.config
        size = (1, config.image_size, config.image_size, config.num_channels)
        return (jax.ShapeDtypeStruct(size, jnp.float32),)


# Mean and standard deviation of the red, green and blue of CLIP's training images, in [0, 1].
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@checked(images=array("any"), image_size=count(1, 2**14))
def clip_pixel_values(
    images: UInt8[np.ndarray, "B H W 3"], image_size: int = 224
) -> Float[np.ndarray, "B {image_size} {image_size} 3"]:
    """Prepare images for CLIP's image tower: float32 `[B, image_size, image_size, 3]`, on the host.

    Resized so that the shorter side has `image_size` (Pillow's bicubic filter, in 8 bits), centre-cropped,
    divided by 255, normalised by mean and standard deviation of CLIP's training images. Radford et al. 2021.

    Args:
        images: uint8 `[B, H, W, 3]`, red, green, blue.
        image_size: side of the result.

    Raises:
        InvalidArgumentError: images of another dtype or shape.

    >>> clip_pixel_values(np.zeros((2, 48, 32, 3), np.uint8), 16).shape
    (2, 16, 16, 3)
    """
    from PIL import Image

    images = as_pixels(images)
    size, (left, top) = _resized(images.shape[1], images.shape[2], image_size)
    pixels = np.stack(
        [np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)) for image in images]
    )[:, top : top + image_size, left : left + image_size]
    mean, std = (np.asarray(value, np.float32).reshape(1, 1, 1, 3) for value in (CLIP_MEAN, CLIP_STD))
    return (pixels.astype(np.float32) / np.float32(255) - mean) / std


def _resized(height: int, width: int, image_size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """((width, height) with the shorter side as given, (left, top) of the square in the middle)."""
    shorter = min(height, width)
    size = (width * image_size // shorter, height * image_size // shorter)
    return size, ((size[0] - image_size) // 2, (size[1] - image_size) // 2)


@checked(images=array("floating", "[B, H, W, 3]", axes=4, filled=True), image_size=count(1, 2**14))
def clip_inputs(
    images: Float[Array, "B H W 3"], image_size: int = 224
) -> Float[Array, "B {image_size} {image_size} 3"]:
    """Prepare images for CLIP's image tower by JAX: as `clip_pixel_values`, without rounding to 8 bits.

    Differentiable where images are within [-1, 1]; beyond it they count as at its ends.

    Args:
        images: [B, H, W, 3] in [-1, 1], red, green, blue.
        image_size: side of the result.

    Raises:
        InvalidArgumentError: images of another dtype or shape.

    >>> clip_inputs(np.zeros((2, 48, 32, 3), np.float32), 16).shape
    (2, 16, 16, 3)
    """
    images = jnp.asarray(images)
    if images.shape[-1] != 3:
        raise InvalidArgumentError(f"images must be [B, H, W, 3], got {list(images.shape)}")
    (width, height), (left, top) = _resized(images.shape[1], images.shape[2], image_size)
    shape = (len(images), height, width, 3)
    pixels = jax.image.resize(jnp.clip(images, -1, 1), shape, "cubic", antialias=True)
    pixels = jnp.clip(pixels[:, top : top + image_size, left : left + image_size] * 0.5 + 0.5, 0, 1)
    mean, std = (np.asarray(value, images.dtype).reshape(1, 1, 1, 3) for value in (CLIP_MEAN, CLIP_STD))
    return (pixels - mean) / std


PRESETS = {
    # OpenAI's ViT-L/14 for CLIP score: 303,966,208 parameters, the projection (786,432) included.
    "clip-l-vision": CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        projection_dim=768,
        num_hidden_layers=24,
        num_attention_heads=16,
        patch_size=14,
    ),
}
