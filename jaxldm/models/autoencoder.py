"""What every KL autoencoder shares: its diagonal Gaussian, and the scaled latents that diffusion works on."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class DiagonalGaussian(NamedTuple):
    """q(z | x) = N(mean, exp(log_variance)), both `[B, h, w, c]`, not scaled.

    Kingma & Welling 2014, appendix B.
    """

    mean: Float[Array, "B h w c"]
    log_variance: Float[Array, "B h w c"]

    def sample(self, key: Array) -> Float[Array, "B h w c"]:
        """mean + exp(log_variance / 2) * N(0, 1), the reparameterisation trick."""
        noise = jax.random.normal(key, self.mean.shape, self.mean.dtype)
        return self.mean + jnp.exp(0.5 * self.log_variance) * noise

    def kl(self) -> Float[Array, "B h w c"]:
        """KL(q || N(0, 1)) of each latent number, in nats: (mean^2 + variance - 1 - log variance) / 2."""
        return 0.5 * (jnp.square(self.mean) + jnp.exp(self.log_variance) - 1.0 - self.log_variance)


def split_moments(moments: Float[Array, "B h w 2c"]) -> DiagonalGaussian:
    """First half of the channels: mean; second half: log-variance, cut to [-30, 20] as LDM does."""
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    return DiagonalGaussian(mean, jnp.clip(log_variance, -30.0, 20.0))


def encode_latents(
    module: nn.Module, params: dict, images: Float[Array, "B H W C"], key: Array | None = None
) -> Float[Array, "B h w c"]:
    """The latents that diffusion models are trained on: (z - shift_factor) * scaling_factor.

    Rombach et al. 2022, appendix G. The two factors live in `module.config`; no caller multiplies.

    Args:
      images: in [-1, 1].
      key: draw z from q(z | x); None takes its mean.
    """
    posterior = module.apply({"params": params}, images, method="encode")
    latents = posterior.mean if key is None else posterior.sample(key)
    return (latents - (module.config.shift_factor or 0.0)) * module.config.scaling_factor


def decode_latents(
    module: nn.Module, params: dict, latents: Float[Array, "B h w c"]
) -> Float[Array, "B H W C"]:
    """The inverse of `encode_latents`: latents as diffusion models draw them -> images, about [-1, 1]."""
    unscaled = latents / module.config.scaling_factor + (module.config.shift_factor or 0.0)
    return module.apply({"params": params}, unscaled, method="decode")
