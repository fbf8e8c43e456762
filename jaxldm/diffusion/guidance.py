"""Guidance: functions from networks to `predict(x, t)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxldm.diffusion.paths import per_image
from jaxldm.errors import InvalidArgumentError


def guide(unconditional: Any, conditional: Any, guidance_scale: Any) -> Any:
    """(1 - w) unconditional + w conditional (Ho and Salimans 2022; their w is guidance_scale - 1).

    Because eps, score, v, flow and x_0 are affine in one another at a fixed (x, t), mixing any of them so is
    the same guidance: in the score it is the gradient of log p(x)^(1 - w) p(x | c)^w. Exact at w = 0 and w =
    1.

    Args:
        unconditional: [B, H, W, C].
        conditional: [B, H, W, C].
        guidance_scale: w, a number or one per image [B].
    """
    w = per_image(guidance_scale, conditional)
    return (1 - w) * unconditional + w * conditional


def rescale_guidance(
    guided: Float[Array, "B ..."], conditional: Float[Array, "B ..."], rescale: Any
) -> Float[Array, "B ..."]:
    """phi guided std(conditional)/std(guided) + (1 - phi) guided: the cure for over-exposed pictures.

    Standard deviations are taken per image over all other axes (Lin et al. 2023, equations 15 and 16; phi
    about 0.7). An image whose guided output is constant is left as it is.

    Args:
        rescale: phi in [0, 1], a number or one per image [B].
    """
    axes = tuple(range(1, guided.ndim))
    std = jnp.std(conditional, axes, keepdims=True), jnp.std(guided, axes, keepdims=True)
    flat = std[1] == 0
    factor = jnp.where(flat, 1, std[0] / jnp.where(flat, 1, std[1]))
    phi = per_image(rescale, guided)
    return phi * (factor * guided) + (1 - phi) * guided


def classifier_free_guidance(
    network: Callable[[Any, Any, Any], Any],
    condition: Any,
    null_condition: Any,
    guidance_scale: Any,
    rescale: Any = 0.0,
) -> Callable[[Any, Any], Any]:
    """`predict(x, t)` that asks the network once, for both branches in one batch of 2B, and guides.

    Where every scale is 1 the conditional branch is the answer, and it alone is computed, with a traced scale
    too.

    Args:
        network: (x [N, H, W, C], t [N], condition [N, ...]) -> output [N, H, W, C], N being 2B or B.
        condition: an array [B, ...] or a tree of them (labels, text states, ...).
        null_condition: what the unconditional branch is told, broadcast to the condition: the null class, or
            a negative prompt. A negative condition is nothing more than this branch replaced.
        guidance_scale: w, a number or one per image [B]; may be traced. 0 is unconditional, 1 conditional.
        rescale: phi of `rescale_guidance`.

    Raises:
        InvalidArgumentError: w or phi is NaN, infinite or negative, or phi is above 1; the two conditions
            differ in form.

    >>> import jax.numpy as jnp
    >>> from jaxldm import diffusion as D
    >>> network = lambda x, t, labels: x * labels[:, None, None, None]
    >>> predict = D.classifier_free_guidance(network, jnp.ones(2), 0.0, guidance_scale=3.0)
    >>> float(predict(jnp.ones((2, 4, 4, 1)), jnp.zeros(2))[0, 0, 0, 0])
    3.0
    """
    guidance_scale = _checked("guidance_scale", guidance_scale, np.inf)
    rescale = _checked("guidance rescale", rescale, 1.0)
    condition = jax.tree.map(jnp.asarray, condition)
    null_condition = broadcast_null(null_condition, condition)
    both = jax.tree.map(lambda *branches: jnp.concatenate(branches), null_condition, condition)

    def conditional_alone(x, t):
        return network(x, t, condition).astype(x.dtype)

    def guided(x, t):
        output = network(jnp.concatenate([x, x]), jnp.concatenate([t, t]), both).astype(x.dtype)
        unconditional, conditional = jnp.split(output, 2)
        mixed = guide(unconditional, conditional, jnp.asarray(guidance_scale, x.dtype))
        if isinstance(rescale, float) and rescale == 0:
            return mixed
        return rescale_guidance(mixed, conditional, jnp.asarray(rescale, x.dtype))

    def predict(x, t):
        if isinstance(guidance_scale, float):
            return conditional_alone(x, t) if guidance_scale == 1 else guided(x, t)
        return jax.lax.cond(jnp.all(guidance_scale == 1), conditional_alone, guided, x, t)

    return predict


def broadcast_null(null_condition: Any, condition: Any) -> Any:
    """The null condition as a tree with the condition's shapes and types.

    Raises:
        InvalidArgumentError: the two differ in form, or a shape does not broadcast.
    """
    if jax.tree.structure(null_condition) != jax.tree.structure(condition):
        raise InvalidArgumentError(
            f"condition is {jax.tree.structure(condition)}, but null_condition is "
            f"{jax.tree.structure(null_condition)}: give both the same form"
        )

    def one(null, kept):
        try:
            return jnp.broadcast_to(jnp.asarray(null, kept.dtype), kept.shape)
        except ValueError as error:
            raise InvalidArgumentError(
                f"null_condition of shape {np.shape(null)} does not broadcast to the condition's {kept.shape}"
            ) from error

    return jax.tree.map(one, null_condition, condition)


def _checked(name: str, value: Any, highest: float) -> Any:
    """A float, or the array given; refuses what is not finite, negative or too high. Tracers pass."""
    if isinstance(value, jax.core.Tracer):
        return value
    numbers = np.asarray(value, np.float64)
    if not (np.isfinite(numbers).all() and (numbers >= 0).all() and (numbers <= highest).all()):
        raise InvalidArgumentError(f"{name} must be a finite number from 0 to {highest:g}, not {value}")
    return float(numbers) if numbers.ndim == 0 else jnp.asarray(value)
