"""DINOv2's vision transformer, whose class token is the feature of FD-DINOv2."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from jaxldm.arguments import array, checked, count
from jaxldm.errors import InvalidArgumentError
from jaxldm.models.clip_vision import ImageEncoding
from jaxldm.models.config import check, check_heads
from jaxldm.models.text_encoder import GENERIC, TransformersConfig
from jaxldm.nn.activations import ACTIVATIONS
from jaxldm.nn.attention import attend
from jaxldm.nn.embeddings import PatchProjection
from jaxldm.nn.initialization import constant, normal, parameter, zeros
from jaxldm.nn.linear import Linear, compute_dtype
from jaxldm.nn.normalization import LayerNorm
from jaxldm.nn.transformer_encoder import MLP
from jaxldm.pixels import as_pixels

# Mean and standard deviation of the red, green and blue of ImageNet, in [0, 1].
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_UNUSED = {"apply_layernorm", "out_features", "out_indices", "reshape_hidden_states", "stage_names"}


@dataclasses.dataclass(frozen=True)
class Dinov2Config(TransformersConfig):
    """Config of `Dinov2Model`; names and defaults are those of transformers.

    Attributes:
        image_size: of the positions in the checkpoint: 518 in the published ones.
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    mlp_ratio: int = 4
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    image_size: int = 224
    patch_size: int = 14
    num_channels: int = 3
    qkv_bias: bool = True
    layerscale_value: float = 1.0
    dtype: str = "float32"

    model_type: ClassVar[str] = "dinov2"
    fixed: ClassVar = {
        **TransformersConfig.fixed,
        "use_swiglu_ffn": False,  # of the giant alone
        "use_mask_token": True,
    }
    ignored: ClassVar = frozenset(GENERIC.split()) | _UNUSED | {"drop_path_rate"}

    def check_values(self) -> None:
        check_heads(self.hidden_size, self.num_attention_heads)
        check(
            self.image_size % self.patch_size == 0,
            f"images of {self.image_size} cannot be cut into whole patches of {self.patch_size}",
        )
        check(self.hidden_act in ACTIVATIONS, f"hidden_act must be one of {', '.join(ACTIVATIONS)}")
        compute_dtype(self.dtype)


class _Positions(nn.Module):
    """Class token, patches and positions; the names of the checkpoint."""

    config: Dinov2Config

    @nn.compact
    def __call__(self, pixel_values: Float[Array, "B H W C"]) -> Float[Array, "B N D"]:
        config, init = self.config, normal(0.02)
        width, side = config.hidden_size, config.image_size // config.patch_size
        patches = _Patches(config, name="patch_embeddings")(pixel_values)
        token = parameter(self, "cls_token", init, (1, 1, width)).astype(patches.dtype)
        parameter(self, "mask_token", zeros, (1, width))  # of the training
        table = parameter(self, "position_embeddings", init, (1, side * side + 1, width))
        height, width_in_pixels = pixel_values.shape[1:3]
        new = (height // config.patch_size, width_in_pixels // config.patch_size)
        table = table if new == (side, side) else _resized_positions(table, side, new)
        token = jnp.broadcast_to(token, (patches.shape[0], 1, width))
        return jnp.concatenate([token, patches], axis=1) + table.astype(patches.dtype)


class _Patches(nn.Module):
    config: Dinov2Config

    @nn.compact
    def __call__(self, pixel_values: Float[Array, "B H W C"]) -> Float[Array, "B N D"]:
        config, init = self.config, normal(0.02)
        options = {"kernel_init": init, "name": "projection"}
        return PatchProjection(config.hidden_size, config.patch_size, config.dtype, **options)(pixel_values)


def _resized_positions(table: Array, side: int, new: tuple[int, int]) -> Array:
    """The positions of another number of patches: PyTorch's bicubic interpolation, not antialiased."""
    rows, columns = (jnp.asarray(_cubic_weights(side, length)) for length in new)
    grid = table[:, 1:].reshape(1, side, side, -1)
    grid = jnp.einsum("ph,bhwc->bpwc", rows, grid, precision="highest")
    grid = jnp.einsum("qw,bpwc->bpqc", columns, grid, precision="highest")
    return jnp.concatenate([table[:, :1], grid.reshape(1, new[0] * new[1], -1)], axis=1)


def _cubic_weights(length: int, wanted: int) -> Float[np.ndarray, "wanted length"]:
    """Weight of each of `length` samples in each of `wanted` ones: Keys 1981, a = -3/4, borders repeated."""
    weights = np.zeros((wanted, length))
    for row in range(wanted):
        place = (row + 0.5) * length / wanted - 0.5
        first = int(np.floor(place)) - 1
        for index in range(first, first + 4):
            x, a = abs(place - index), -0.75
            near = ((a + 2) * x - (a + 3)) * x * x + 1
            far = (((x - 5) * x + 8) * x - 4) * a
            weights[row, min(max(index, 0), length - 1)] += near if x <= 1 else far
    return weights.astype(np.float32)


class _Heads(nn.Module):
    """The projections to query, key and value, and the attention."""

    config: Dinov2Config

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        config = self.config
        query, key, value = (
            Linear(config.hidden_size, config.qkv_bias, config.dtype, normal(0.02), zeros, name=name)(x)
            for name in ("query", "key", "value")
        )
        return attend(self, query, key, value, config.num_attention_heads)


class _Output(nn.Module):
    config: Dinov2Config

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        config = self.config
        return Linear(config.hidden_size, True, config.dtype, normal(0.02), zeros, name="dense")(x)


class _Attention(nn.Module):
    config: Dinov2Config

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        return _Output(self.config, name="output")(_Heads(self.config, name="attention")(x))


class _LayerScale(nn.Module):
    """x times a learned number per channel. Touvron et al. 2021, "Going deeper", eq. 4."""

    start: float

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        scale = parameter(self, "lambda1", constant(self.start), (x.shape[-1],))
        return x * scale.astype(x.dtype)[None, None]


class _Layer(nn.Module):
    config: Dinov2Config

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        config = self.config

        def normalised(x: Array, name: str) -> Array:
            return LayerNorm(config.layer_norm_eps, config.dtype, name=name)(x)

        h = _Attention(config, name="attention")(normalised(x, "norm1"))
        x = x + _LayerScale(config.layerscale_value, name="layer_scale1")(h)
        mlp = MLP(config.mlp_ratio * config.hidden_size, config.hidden_act, config.dtype, name="mlp")
        h = mlp(normalised(x, "norm2"))
        return x + _LayerScale(config.layerscale_value, name="layer_scale2")(h)


class _Encoder(nn.Module):
    config: Dinov2Config

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> tuple[Float[Array, "B N D"], ...]:
        states = [x]
        for index in range(self.config.num_hidden_layers):
            states.append(_Layer(self.config, name=f"layer_{index}")(states[-1]))
        return tuple(states)


class Dinov2Model(nn.Module):
    """DINOv2: a pre-norm vision transformer with layer scale. Oquab et al. 2024; Darcet et al. 2024.

    Call: pixel_values `[B, H, W, 3]` made by `dinov2_pixel_values`, H and W multiples of the patch size ->
    `ImageEncoding`, of which `pooled` is the normalised class token and `image_embeds` the same.

    Raises:
        InvalidArgumentError: images that cannot be cut into whole patches.
    """

    config: Dinov2Config

    @nn.compact
    def __call__(self, pixel_values: Float[Array, "B H W C"]) -> ImageEncoding:
        config = self.config
        size = pixel_values.shape[1:3]
        if pixel_values.shape[-1] != config.num_channels or any(
            n % config.patch_size or n == 0 for n in size
        ):
            raise InvalidArgumentError(
                f"pixel_values must be [B, H, W, {config.num_channels}], H and W multiples of "
                f"{config.patch_size}, not {pixel_values.shape}: make them with dinov2_pixel_values(images)"
            )
        embedded = _Positions(config, name="embeddings")(pixel_values)
        states = _Encoder(config, name="encoder")(embedded)
        last = LayerNorm(config.layer_norm_eps, config.dtype, name="layernorm")(states[-1])
        return ImageEncoding(last, last[:, 0], last[:, 0], states)

    def example_inputs(self) -> tuple:
        """The shape of the images that `init` traces the model with."""
        size = (1, self.config.image_size, self.config.image_size, self.config.num_channels)
        return (jax.ShapeDtypeStruct(size, jnp.float32),)


@checked(images=array("any"), image_size=count(1, 2**14))
def dinov2_pixel_values(
    images: UInt8[np.ndarray, "B H W 3"], image_size: int = 224
) -> Float[np.ndarray, "B {image_size} {image_size} 3"]:
    """Prepare images as FD-DINOv2 does: float32 `[B, image_size, image_size, 3]`, on the host.

    Resized by Pillow's bicubic filter in 8 bits, whatever the aspect ratio, divided by 255, normalised by
    ImageNet's mean and standard deviation. Stein et al. 2023 (dgm-eval).

    Args:
        images: uint8 `[B, H, W, 3]`, red, green, blue.
        image_size: side of the result.

    Raises:
        InvalidArgumentError: images of another dtype or shape.

    >>> dinov2_pixel_values(np.zeros((2, 48, 32, 3), np.uint8), 28).shape
    (2, 28, 28, 3)
    """
    from PIL import Image

    size = (image_size, image_size)
    resized = [Image.fromarray(image).resize(size, Image.Resampling.BICUBIC) for image in as_pixels(images)]
    pixels = np.stack([np.asarray(image) for image in resized]).astype(np.float32)
    mean, std = (np.asarray(value, np.float32).reshape(1, 1, 1, 3) for value in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels / np.float32(255) - mean) / std


PRESETS = {
    # ViT-L/14 of FD-DINOv2: 304,368,640 parameters.
    "dinov2-large": Dinov2Config(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=518
    ),
}
