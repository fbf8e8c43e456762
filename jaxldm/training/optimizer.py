"""AdamW with linear warm-up, cosine decay and clipping by the global norm, as one optax transformation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxldm.errors import InvalidArgumentError


class Optimizer(NamedTuple):
    """An optax `GradientTransformation` (`init`, `update`) that also tells its learning rate, for the log."""

    init: Callable[..., Any]
    update: Callable[..., Any]
    learning_rate: Callable[[Any], Any]


def warmup_cosine(
    learning_rate: float, warmup_steps: int, total_steps: int, final_scale: float = 0.0
) -> Callable[[Int[Array, ""]], Float[Array, ""]]:
    """The learning rate as a function of the number n of updates already done.

        n < W:   lr (n + 1) / W
        n >= W:  lr (f + (1 - f) (1 + cos(pi (n - W) / (N - W))) / 2)

    with W = `warmup_steps`, N = `total_steps` and f = `final_scale` (f = 1 keeps the rate constant after the
    warm-up). The first update has the rate lr / W and not 0: a step with rate 0 would be a wasted one.

    Source: Loshchilov and Hutter 2017 (SGDR, eq. 5), one cycle. Raises `InvalidArgumentError`.
    """
    if not (math.isfinite(learning_rate) and learning_rate > 0):
        raise InvalidArgumentError(f"learning_rate must be positive and finite, not {learning_rate}")
    if total_steps < 1:
        raise InvalidArgumentError(f"total_steps must be at least 1, not {total_steps}")
    if not 0 <= warmup_steps <= total_steps:
        raise InvalidArgumentError(
            f"warmup_steps must lie in [0, total_steps = {total_steps}], not {warmup_steps}"
        )
    if not 0 <= final_scale <= 1:
        raise InvalidArgumentError(f"final_scale must lie in [0, 1], not {final_scale}")

    def schedule(step):
        n = jnp.asarray(step, jnp.float32)
        rising = (n + 1.0) / max(warmup_steps, 1)
        progress = jnp.clip((n - warmup_steps) / max(total_steps - warmup_steps, 1), 0.0, 1.0)
        falling = final_scale + (1.0 - final_scale) * 0.5 * (1.0 + jnp.cos(math.pi * progress))
        return learning_rate * jnp.where(n < warmup_steps, rising, falling)

    return schedule


def optimizer(
    learning_rate: float,
    warmup_steps: int = 0,
    total_steps: int = 1,
    weight_decay: float = 0.0,
    max_grad_norm: float | None = 1.0,
    b1: float = 0.9,
    b2: float = 0.999,
    *,
    eps: float = 1e-8,
    final_scale: float = 0.0,
    decays: Callable[[Any], Any] | None = None,
) -> Optimizer:
    """AdamW with decoupled weight decay, the rate of `warmup_cosine`, gradients clipped to a global norm.

        g <- g min(1, max_grad_norm / |g|)          (all gradients as one vector; None: no clipping)
        m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g^2
        p <- p - lr (m_hat / (sqrt(v_hat) + eps) + weight_decay p)

    `decays(params)` gives a tree of booleans, of arrays or of single ones, that says which numbers decay; the
    default is `decay_matrices`. With `weight_decay = 0` this is Adam.

    Sources: Kingma and Ba 2015, Algorithm 1; Loshchilov and Hutter 2019, Algorithm 2; Pascanu et al. 2013.
    Raises `InvalidArgumentError` for numbers outside their range.

    >>> import jax.numpy as jnp
    >>> adam = optimizer(1e-3, warmup_steps=10, total_steps=100)
    >>> float(adam.learning_rate(0)), float(adam.learning_rate(9)), float(adam.learning_rate(100))
    (0.00010000000474974513, 0.0010000000474974513, 0.0)
    """
    schedule = warmup_cosine(learning_rate, warmup_steps, total_steps, final_scale)
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise InvalidArgumentError(
            f"max_grad_norm must be positive, or None for no clipping, not {max_grad_norm}"
        )
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise InvalidArgumentError(f"weight_decay must be 0 or more, not {weight_decay}")
    for name, value in (("b1", b1), ("b2", b2)):
        if not 0 <= value < 1:
            raise InvalidArgumentError(f"{name} must lie in [0, 1), not {value}")
    clip = [] if max_grad_norm is None else [optax.clip_by_global_norm(max_grad_norm)]
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
    decay = [] if weight_decay == 0 else [_decayed_weights(weight_decay, decays or decay_matrices)]
    chain = optax.chain(*clip, adam, *decay, optax.scale_by_learning_rate(schedule))

    def update(gradients, state, params=None):
        with jax.numpy_dtype_promotion("standard"):  # optax raises the float b1 to the integer count
            return chain.update(gradients, state, params)

    return Optimizer(chain.init, update, schedule)


def _decayed_weights(weight_decay: float, decays: Callable[[Any], Any]) -> optax.GradientTransformation:
    """update <- update + weight_decay p, where `decays` says so, number by number."""

    def update(updates, state, params):
        add = lambda update, p, mask: update + weight_decay * jnp.where(mask, p, 0.0)  # noqa: E731
        return jax.tree.map(add, updates, params, decays(params)), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def decay_matrices(params: Any) -> Any:
    """True for arrays of two or more dimensions: not for biases, nor for the scales of norms."""
    return jax.tree.map(lambda p: p.ndim >= 2, params)
