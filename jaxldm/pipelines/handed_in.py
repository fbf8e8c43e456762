"""What images and latents look like that are handed to an autoencoder."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float

from jaxldm.errors import InvalidArgumentError

# Of images in [-1, 1], with room for what a network drew beyond; pixels of 0 to 255 are far above.
MOST_OF_IMAGES = 20.0


def latent_channels(config: Any) -> int:
    """The channels of a latent as diffusion models have it, from an autoencoder's config."""
    return getattr(config, "codebook_width", config.latent_channels)


def check_channels(name: str, array: Float[np.ndarray, "N H W C"], channels: int) -> None:
    """Raise `InvalidArgumentError` unless the last axis has so many channels."""
    if array.shape[-1] == channels:
        return
    hint = f": it looks like [N, {channels}, H, W], move the channels last" * (array.shape[1] == channels)
    raise InvalidArgumentError(
        f"{name} must be [N, H, W, {channels}] for this autoencoder, got {list(array.shape)}{hint}"
    )


def check_range(images: Float[np.ndarray, "N H W C"]) -> None:
    """Raise `InvalidArgumentError` for pixels of 0 to 255 in place of images in [-1, 1]."""
    largest = images.max(initial=0)
    if largest > MOST_OF_IMAGES:
        raise InvalidArgumentError(
            f"images must lie in [-1, 1], got numbers up to {largest:g}: write x / 127.5 - 1 of 8-bit pixels"
        )
