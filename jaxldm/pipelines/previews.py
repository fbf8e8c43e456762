"""Pictures on the way: what the model sees after a step, decoded by an autoencoder that is fast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxldm.arguments import checked, count, function
from jaxldm.pipelines.latents import decode_images
from jaxldm.pipelines.network import A_NETWORK, Network


@checked(vae=A_NETWORK, show=function("(step, t, images)"), every=count(1))
def previewer(
    vae: Network, show: Callable[[int, float, Float[np.ndarray, "B H W C"]], Any], every: int = 1
) -> Callable[[int, float, Any, Any], None]:
    """An `on_x0` of a call: shows what the model saw after each step as images.

    Args:
        vae: of as many latent channels as the model's. TAESD decodes in a small part of the time of a step.
        show: called as show(step, t, images), images float32 [B, H, W, 3] in [-1, 1], of one batch.
        every: after every step, every second one, and so on; the first step is number 0.

    >>> import jax                                                                            # doctest: +SKIP
    >>> from jaxldm import checkpoints, pipelines                                             # doctest: +SKIP
    >>> taesd = pipelines.Network(*checkpoints.load("taesd"))                                 # doctest: +SKIP
    >>> on_x0 = pipelines.previewer(taesd, lambda step, t, images: show(images[0]), every=5)  # doctest: +SKIP
    >>> images = pipe(jax.random.key(0), "a cat", on_x0=on_x0)                                # doctest: +SKIP
    """

    def on_x0(step: int, t: float, latents: Any, x_0: Any) -> None:
        if step % every == 0:
            show(step, t, decode_images(vae, x_0))

    return on_x0
