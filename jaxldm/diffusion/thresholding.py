"""Thresholding of x_0: what keeps strongly guided pixels in range, and the frame for such transforms."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Float, ScalarLike

from jaxldm.arguments import array, checked, function, optional
from jaxldm.diffusion.compiling import traced
from jaxldm.diffusion.denoiser import A_DENOISER, Denoiser
from jaxldm.diffusion.guidance import check_scale
from jaxldm.diffusion.paths import per_image
from jaxldm.errors import InvalidArgumentError


@checked(denoise=A_DENOISER, change=function("(x_0, x, t) -> x_0"))
def change_x0(denoise: Callable[[Any, Any], Any], change: Callable[[Any, Any, Any], Any]) -> Any:
    """The denoiser with its x_0 changed: change(x_0, x, t [B]) -> x_0. Such transforms compose.

    Its path, a learned variance and the memory of guidance are kept.
    """

    def function(x, t):
        return change(denoise(x, t), x, jnp.broadcast_to(jnp.asarray(t, x.dtype), x.shape[:1]))

    def with_more(denoise_more):  # (x, t, ...) -> (x_0, something else)
        def changed(x, t, *rest):
            x_0, more = denoise_more(x, t, *rest)
            return change(x_0, x, t), more

        return changed

    if not isinstance(denoise, Denoiser):
        return function
    names = ("with_variance", "remembering", "with_unchanged")
    others: dict[str, Any] = {name: getattr(denoise, name, None) for name in names}
    others["with_unchanged"] = others["with_unchanged"] or (lambda x, t: (denoise.function(x, t),) * 2)
    changed = {name: with_more(other) for name, other in others.items() if other is not None}
    return dataclasses.replace(denoise, function=function, **changed)


@checked(denoise=A_DENOISER, low=array(axes=0), high=array(axes=0))
def static_threshold(
    denoise: Callable[[Any, Any], Any], low: Float[Any, ""] | float = -1.0, high: Float[Any, ""] | float = 1.0
) -> Any:
    """x_0 clipped to [low, high], the range of the data (Ho et al. 2020; Saharia et al. 2022, section 2.3).

    Args:
        denoise: any; for images in pixels, not latents, which have no range.
        low: of the data.
        high: of the data.

    Raises:
        InvalidArgumentError: unless low < high.
    """
    if not traced(low, high) and not low < high:
        raise InvalidArgumentError(f"static_threshold needs low < high, not {low}, {high}")
    return change_x0(denoise, lambda x_0, x, t: jnp.clip(x_0, low, high))


@checked(denoise=A_DENOISER, max_value=optional(array(axes=0)))
def dynamic_threshold(
    denoise: Callable[[Any, Any], Any],
    percentile: ScalarLike = 0.995,
    max_value: Float[Any, ""] | float | None = None,
) -> Any:
    """x_0 clipped to [-s, s] and divided by s (Saharia et al. 2022, section 2.3; the data lie in [-1, 1]).

    s is the percentile of |x_0| over all numbers of an image, at least 1: where nothing is out of range
    nothing happens, and elsewhere the picture is darkened as a whole rather than cut off.

    Args:
        denoise: any; for images in pixels, not latents.
        percentile: in [0, 1]; 0.995 in the paper's figure A.10.
        max_value: the most that s may be; None is the paper's, no bound. In diffusers
            `sample_max_value` is 1 by default, and that makes it static thresholding.

    Raises:
        InvalidArgumentError: a percentile outside [0, 1], or a max_value below 1.

    >>> import jax.numpy as jnp
    >>> from jaxldm import diffusion as D
    >>> denoise = D.dynamic_threshold(lambda x, t: 2 * x)
    >>> float(denoise(jnp.ones((1, 4, 4, 1)), 0.0).max())
    1.0
    """
    check_scale("percentile", percentile, 1.0)
    if not (max_value is None or traced(max_value) or max_value >= 1):
        raise InvalidArgumentError(f"max_value must be at least 1, not {max_value}")

    def squeeze(x_0, x, t):
        s = jnp.maximum(jnp.quantile(jnp.abs(x_0).reshape(x_0.shape[0], -1), percentile, axis=1), 1)
        s = per_image(s if max_value is None else jnp.minimum(s, max_value), x_0)
        return jnp.clip(x_0, -s, s) / s

    return change_x0(denoise, squeeze)
