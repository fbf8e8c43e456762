"""Edges of pictures, for a ControlNet that needs no annotated data."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float

from jaxldm.arguments import checked
from jaxldm.data.images import check_images

GREY = np.array([0.299, 0.587, 0.114], np.float32)  # of R, G and B (ITU-R BT.601)


def _some_images(name: str, value: Any) -> Float[np.ndarray, "N H W C"]:
    return check_images(value, name=name)


@checked(images=_some_images)
def edges(images: Float[np.ndarray, "N H W C"]) -> Float[np.ndarray, "N H W 1"]:
    """min(1, |grad y| / 4), the gradient of the brightness y by Sobel's 3x3 operators.

    y is in [0, 1], so that a straight edge between black and white gives 1, and 0 is where nothing changes.
    No threshold: weak edges stay weak. At the border the outermost pixels are repeated.

    Args:
        images: `[N, H, W, C]` in [-1, 1], C = 1 or 3 (RGB).

    Source: Sobel and Feldman 1968; see Gonzalez and Woods, Digital Image Processing, section 10.2.

    >>> import numpy as np
    >>> image = np.where(np.arange(6) < 3, -1.0, 1.0) * np.ones((1, 4, 1), np.float32)
    >>> edges(image[..., None].astype(np.float32))[0, 0, :, 0].tolist()
    [0.0, 0.0, 1.0, 1.0, 0.0, 0.0]
    """
    grey = images @ GREY if images.shape[-1] == 3 else images.mean(-1)
    y = np.pad((grey.astype(np.float32) + 1) / 2, ((0, 0), (1, 1), (1, 1)), mode="edge")
    across = y[:, :, 2:] - y[:, :, :-2]
    down = y[:, 2:] - y[:, :-2]
    dx = across[:, :-2] + 2 * across[:, 1:-1] + across[:, 2:]
    dy = down[:, :, :-2] + 2 * down[:, :, 1:-1] + down[:, :, 2:]
    return np.minimum(1, np.hypot(dx, dy) / 4)[..., None].astype(np.float32)
