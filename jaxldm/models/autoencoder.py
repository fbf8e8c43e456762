"""Shared by all autoencoders: the Gaussian of KL autoencoders, and the scaled latents of diffusion models."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from jaxldm.arguments import a_key, a_module, a_params, array, checked, flag, instance, optional
from jaxldm.errors import InvalidArgumentError
from jaxldm.models.config import ModelConfig
from jaxldm.models.inputs import fitting
from jaxldm.models.tiling import Tiling, sliced, tiled_decoder, tiled_encoder
from jaxldm.pixels import in_unit_range


class DiagonalGaussian(NamedTuple):
    """q(z | x) = N(mean, exp(log_variance)), both `[B, h, w, c]`, not scaled.

    Kingma & Welling 2014, appendix B.
    """

    mean: Float[Array, "B h w c"]
    log_variance: Float[Array, "B h w c"]

    def sample(self, key: PRNGKeyArray) -> Float[Array, "B h w c"]:
        """mean + exp(log_variance / 2) * N(0, 1), the reparameterisation trick."""
        noise = jax.random.normal(key, self.mean.shape, self.mean.dtype)
        return self.mean + jnp.exp(0.5 * self.log_variance) * noise

    def kl(self) -> Float[Array, "B h w c"]:
        """KL(q || N(0, 1)) of each latent number, in nats: (mean^2 + variance - 1 - log variance) / 2."""
        return 0.5 * (jnp.square(self.mean) + jnp.exp(self.log_variance) - 1.0 - self.log_variance)


def split_moments(moments: Float[Array, "B h w moments"]) -> DiagonalGaussian:
    """First half of the channels: mean; second half: log-variance, clipped to [-30, 20] as in LDM."""
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    return DiagonalGaussian(mean, jnp.clip(log_variance, -30.0, 20.0))


IMAGES = in_unit_range(array("floating", "[B, H, W, C]", axes=4, filled=True))
LATENTS = array("floating", "[B, h, w, c]", axes=4, filled=True)
A_TILING = instance(Tiling, "models.Tiling(...)")


@checked(
    module=a_module,
    params=a_params,
    images=IMAGES,
    key=optional(a_key),
    tiling=optional(A_TILING),
    slicing=flag,
)
def encode_latents(
    module: nn.Module,
    params: dict,
    images: Float[Array, "B H W C"],
    key: PRNGKeyArray | None = None,
    *,
    tiling: Tiling | None = None,
    slicing: bool = False,
) -> Float[Array, "B h w c"]:
    """The latents that diffusion models are trained on: (z - shift_factor) * scaling_factor.

    Rombach et al. 2022, appendix G. With `latents_mean` and `latents_std` in the config,
    (z - latents_mean) * scaling_factor / latents_std, channel by channel. The factors are in `module.config`;
    no caller multiplies.

    Args:
        module: the autoencoder.
        params: its parameters.
        images: in [-1, 1].
        key: draw z from q(z | x); None takes its mean. An autoencoder with a codebook has one z, before its
            codebook, and ignores the key.
        tiling: encode large images in overlapping tiles.
        slicing: encode one image at a time.
    """

    def encode(x: Float[Array, " ..."]) -> DiagonalGaussian | Float[Array, " ..."]:
        with fitting(module):
            return cast(Any, module.apply({"params": params}, _pixels(module.config, x), method="encode"))

    if tiling is not None:
        encode = tiled_encoder(encode, module.config, tiling)
    encoded = (sliced(encode) if slicing else encode)(images)
    if isinstance(encoded, DiagonalGaussian):
        encoded = encoded.mean if key is None else encoded.sample(key)
    shift, scale = shift_and_scale(module.config, encoded)
    return (encoded - shift) * scale


@checked(
    module=a_module,
    params=a_params,
    latents=LATENTS,
    tiling=optional(A_TILING),
    slicing=flag,
    image=optional(IMAGES),
    mask=optional(array("floating", "[B, H, W, 1]", axes=4, filled=True)),
)
def decode_latents(
    module: nn.Module,
    params: dict,
    latents: Float[Array, "B h w c"],
    *,
    tiling: Tiling | None = None,
    slicing: bool = False,
    image: Float[Array, "B H W C"] | None = None,
    mask: Float[Array, "B H W 1"] | None = None,
) -> Float[Array, "B H W C"]:
    """The inverse of `encode_latents`: latents of a diffusion model -> images, about [-1, 1].

    An autoencoder with a codebook replaces z by the nearest entries first. The other arguments are those of
    `encode_latents`.

    Args:
        image: in [-1, 1], what inpainting keeps where `mask` is 0: for `AsymmetricAutoencoderKL`.
        mask: 1 where the image is drawn again.

    Raises:
        InvalidArgumentError: image and mask for another autoencoder, of another size, one without the other,
            or with tiling or slicing.
    """
    kept = _kept_part(module.config, latents, image, mask, tiling is not None or slicing)

    def decode(z: Array) -> Array:
        with fitting(module):
            images = cast(Array, module.apply({"params": params}, z, *kept, method="decode"))
        return 2 * images - 1 if _from_zero(module.config) else images

    if tiling is not None:
        decode = tiled_decoder(decode, module.config, tiling)
    shift, scale = shift_and_scale(module.config, latents)
    return (sliced(decode) if slicing else decode)(latents / scale + shift)


def _kept_part(
    config: Any, latents: Array, image: Array | None, mask: Array | None, in_parts: bool
) -> tuple[Array, ...]:
    """(image, mask) for a decoder that takes them, or nothing. Raises as `decode_latents` says."""
    if image is None and mask is None:
        return ()
    if not getattr(config, "takes_mask", False):
        raise InvalidArgumentError(
            "image and mask are for the decoder of AsymmetricAutoencoderKL: leave them out"
        )
    if image is None or mask is None:
        raise InvalidArgumentError("image and mask come together: the kept part needs both")
    if in_parts:
        raise InvalidArgumentError(
            "tiling and slicing cannot be combined with image and mask: leave them out"
        )
    factor = 2 ** (len(config.block_out_channels) - 1)
    height, width = (side * factor for side in latents.shape[1:3])
    for name, value, channels in (("image", image, config.out_channels), ("mask", mask, 1)):
        wanted = (latents.shape[0], height, width, channels)
        if value.shape != wanted:
            raise InvalidArgumentError(
                f"{name} must be {list(wanted)} for these latents, got {list(value.shape)}"
            )
    return image, mask


def _from_zero(config: ModelConfig) -> bool:
    """Whether the autoencoder's own images are in [0, 1] (Paella's) and not in [-1, 1]."""
    return getattr(config, "pixels_from_zero", False)


def _pixels(config: ModelConfig, images: Array) -> Array:
    return images / 2 + 0.5 if _from_zero(config) else images


def shift_and_scale(config: Any, like: Array) -> tuple[Array, Array]:
    """The scaled latents are (z - shift) * scale; both broadcast against latents such as `like`."""
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is None:
        mean, std = getattr(config, "shift_factor", None) or 0.0, 1.0
    scale = config.scaling_factor / np.asarray(std, np.float64)

    def spread(value: Any) -> Array:
        return jnp.asarray(value, like.dtype).reshape(1, 1, 1, -1)

    return spread(mean), spread(scale)
