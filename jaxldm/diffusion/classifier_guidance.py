"""Classifier guidance (Dhariwal and Nichol 2021)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxldm.arguments import checked, function
from jaxldm.diffusion.denoiser import Denoiser
from jaxldm.diffusion.guidance import GuidanceScale, check_scale, scale_at
from jaxldm.diffusion.paths import per_image
from jaxldm.diffusion.solvers.solver import divide, path_of
from jaxldm.diffusion.thresholding import change_x0
from jaxldm.errors import InvalidArgumentError
from jaxldm.functions import returned


@checked(log_probability=function("(x, t) -> log p(c | x)"))
def classifier_guidance(
    denoise: Denoiser, log_probability: Callable[[Any, Any], Any], guidance_scale: GuidanceScale
) -> Denoiser:
    """x_0 + w sigma^2 / alpha grad_x log p(c | x_t): Dhariwal and Nichol 2021, Algorithm 2, on every path.

    Their eps - sqrt(1 - abar) w grad, carried over to x_0. With the exact classifier, w = 1 turns the
    unconditional denoiser into the conditional one, and w gives that of p(x) p(c | x)^w. At pure noise (alpha
    = 0) an image has no information about its class, so no guidance is added there.

    Args:
        denoise: unconditional or not; it must know its path.
        log_probability: (x_t [B, H, W, C], t [B]) -> log p(c | x_t) [B], of a classifier trained on noisy
            images x_t of this path: such as `jax.nn.log_softmax(classifier(x, t))[jnp.arange(B), labels]`. An
            image's number must depend on that image alone.
        guidance_scale: w, a number or one per image [B], or a function of t [B] that gives either; may be
            traced. 0 leaves the denoiser as it is.

    Raises:
        InvalidArgumentError: w is NaN, infinite or negative; a denoiser without a path.

    >>> import jax.numpy as jnp
    >>> from jaxldm import diffusion as D
    >>> denoise = D.gaussian_denoiser(D.Flow())
    >>> bright = lambda x, t: jnp.log(jnp.clip(x.mean((1, 2, 3)), 1e-3))
    >>> guided = D.classifier_guidance(denoise, bright, guidance_scale=2.0)
    """
    path = path_of(denoise, "classifier_guidance")
    if not callable(guidance_scale):
        guidance_scale = check_scale("guidance_scale", guidance_scale, np.inf)

    def guided(x_0, x, t):
        w = scale_at(guidance_scale, t)
        gradient = image_gradient(lambda x: _one_each(log_probability(x, t), x), x)
        strength = divide(path.sigma(t) ** 2, path.alpha(t), 0.0)
        return x_0 + per_image(w * strength, x) * gradient

    return change_x0(denoise, guided)


def image_gradient(score: Callable[[Any], Any], x: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
    """The gradient of each image's number, score(x) [B], by that image; x's shape and type."""
    return jax.grad(lambda x: jnp.sum(score(x)))(x).astype(x.dtype)


def _one_each(log_p: Any, x: Any) -> Any:
    """One number for each image, or their sum already."""
    if np.shape(returned("log_probability", log_p)) not in ((), x.shape[:1]):
        raise InvalidArgumentError(
            f"log_probability must return one number for each image, [{len(x)}], got shape "
            f"{list(np.shape(log_p))}: pick those of the labels, log_p[jnp.arange({len(x)}), labels]"
        )
    return log_p
