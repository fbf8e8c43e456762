"""FreeU: more of the backbone and less of the low frequencies of the skips in a U-Net. Si et al. 2023.

arXiv:2309.11497, section 3.2, in the form of the authors' first code and of diffusers: a constant factor.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

THRESHOLD = 1  # frequencies on each side of zero that are scaled


def free_u(
    x: Float[Array, "B H W C"], skip: Float[Array, "B H W K"], backbone: float, low: float
) -> tuple[Float[Array, "B H W C"], Float[Array, "B H W K"]]:
    """(x, its first half of channels times `backbone`; the skip, its lowest frequencies times `low`)."""
    half = x.shape[-1] // 2
    factors = np.where(np.arange(x.shape[-1]) < half, backbone, 1.0).astype(np.float32)
    return x * jnp.asarray(factors, x.dtype).reshape(1, 1, 1, -1), scale_low_frequencies(skip, low)


def scale_low_frequencies(x: Float[Array, "B H W C"], scale: float) -> Float[Array, "B H W C"]:
    """x with its frequencies -1 and 0 along both axes times `scale`; computed in float32."""
    mask = np.ones(x.shape[1:3], np.float32)
    rows, columns = (slice(max(n // 2 - THRESHOLD, 0), n // 2 + THRESHOLD) for n in mask.shape)
    mask[rows, columns] = scale
    mask = np.fft.ifftshift(mask)[None, :, :, None].astype(np.complex64)
    frequencies = jnp.fft.fftn(x.astype(jnp.float32), axes=(1, 2)) * mask
    return jnp.fft.ifftn(frequencies, axes=(1, 2)).real.astype(x.dtype)
