"""What a denoiser's loss may have besides its error: a learned weight, tokens left out, frozen features."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxldm.arguments import array, check_dims, checked, count, number, one_key

# The frequencies and phases of the Fourier features are drawn once and for all: they are not trained.
_CHANNELS = 128
_FREQUENCIES, _PHASES = (
    np.random.default_rng(0).standard_normal(_CHANNELS).astype(np.float32),
    np.random.default_rng(1).uniform(size=_CHANNELS).astype(np.float32),
)
_LARGEST = 20.0  # of the log-SNR: at pure noise it is -infinity


def new_log_variance() -> dict[str, Array]:
    """The parameters of `learned_log_variance`: with them it is 0 at every noise."""
    return {"kernel": jnp.zeros(_CHANNELS), "bias": jnp.zeros(1)}


def learned_log_variance(params: dict[str, Any], log_snr: Float[Array, " B"]) -> Float[Array, " B"]:
    """u of `D.diffusion_loss(log_variance=...)`: a linear map of Fourier features of the noise.

    Karras et al. 2024 (EDM2), equations 14 and 15 and section B.4: cos(2 pi (f c + phase)) of c = ln(sigma /
    alpha) / 4 with fixed random frequencies.
    """
    c = -jnp.clip(jnp.float32(log_snr), -_LARGEST, _LARGEST) / 8
    angles = 2 * np.pi * (c[:, None] * _FREQUENCIES[None] + _PHASES[None])
    features = np.float32(np.sqrt(2 / _CHANNELS)) * jnp.cos(angles)
    return features @ params["kernel"] + params["bias"]


@checked(key=one_key, batch_size=count(1), num_tokens=count(1), share=number(above=0, high=1))
def kept_tokens(key: PRNGKeyArray, batch_size: int, num_tokens: int, share: float) -> Int[Array, "B k"]:
    """For each example k = round(share x num_tokens), at least 1, different tokens in order: which stay.

    Krause et al. 2025 (TREAD), section 3.2: they go through the blocks of a DiT's `route`, the others skip
    these. How many they are never changes, so nothing is compiled again.
    """
    kept = max(1, round(share * num_tokens))
    order = jnp.argsort(jax.random.uniform(key, (batch_size, num_tokens)), axis=1)
    return jnp.sort(order[:, :kept], axis=1)


def new_projector(key: PRNGKeyArray, width: int, hidden: int, features: int) -> dict[str, Any]:
    """Parameters of `project` from tokens of `width` to `features`: three layers that begin as PyTorch's."""
    sides = [width, hidden, hidden, features]
    layers = {}
    for place, (fan_in, out) in enumerate(itertools.pairwise(sides)):
        of_kernel, of_bias = jax.random.split(jax.random.fold_in(key, place))
        bound = fan_in**-0.5
        layers[f"layer_{place}"] = {
            "kernel": jax.random.uniform(of_kernel, (fan_in, out), jnp.float32, -bound, bound),
            "bias": jax.random.uniform(of_bias, (out,), jnp.float32, -bound, bound),
        }
    return layers


def project(params: dict[str, Any], tokens: Float[Array, "B N C"]) -> Float[Array, "B N D"]:
    """Linear, SiLU, Linear, SiLU, Linear of each token (Yu et al. 2025, REPA, section 3)."""
    h = tokens.astype(jnp.float32)
    for place in range(3):
        layer = params[f"layer_{place}"]
        h = jax.nn.silu(h) if place else h
        h = h @ layer["kernel"] + layer["bias"].reshape(1, 1, -1)
    return h


_TOKENS = array("floating", "[B, N, D]", axes=3, filled=True)


@checked(projected=_TOKENS, features=_TOKENS)
def alignment_loss(projected: Float[Array, "B N D"], features: Float[Array, "B N D"]) -> Float[Array, ""]:
    """-mean cosine of projected tokens and a frozen encoder's features of the clean image, token by token.

    Yu et al. 2025 (REPA), equation 6: -1 where they point alike. No gradient reaches the features.
    """
    check_dims(projected=(projected, "B N D"), features=(features, "B N D"))
    features = jax.lax.stop_gradient(features)
    return -jnp.mean(jnp.sum(_unit(projected) * _unit(features), axis=-1))


def _unit(x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
    x = jnp.asarray(x, jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), -1, keepdims=True) + 1e-12)
