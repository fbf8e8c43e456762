"""What images and latents look like that are handed to an autoencoder."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float

from jaxldm.errors import InvalidArgumentError


def latent_channels(config: Any) -> int:
    """The channels of a latent as diffusion models have it, from an autoencoder's config."""
    for name in ("codebook_width", "patch_channels"):
        if hasattr(config, name):
            return getattr(config, name)
    return config.latent_channels


def check_channels(name: str, array: Float[np.ndarray, "N H W C"], channels: int) -> None:
    """Raise `InvalidArgumentError` unless the last axis has so many channels."""
    if array.shape[-1] == channels:
        return
    hint = f": it looks like [N, {channels}, H, W], move the channels last" * (array.shape[1] == channels)
    raise InvalidArgumentError(
        f"{name} must be [N, H, W, {channels}] for this autoencoder, got {list(array.shape)}{hint}"
    )
