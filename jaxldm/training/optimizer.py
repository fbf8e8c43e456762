"""Optimizers by name, with linear warm-up, cosine decay and clipping by the global norm."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxldm.arguments import checked, choice, count, number, optional, refuse
from jaxldm.errors import InvalidArgumentError
from jaxldm.training.kinds import decays, map_with_names
from jaxldm.training.named_optimizers import NAMED, Settings, optax_promotion

OPTIMIZERS = ("adamw", *NAMED)


class Optimizer(NamedTuple):
    """An optax `GradientTransformation` (`init`, `update`) with its learning rate, for the log."""

    init: Callable[..., Any]
    update: Callable[..., Any]
    learning_rate: Callable[[Any], Any]


def AN_OPTIMIZER(name: str, value: Any) -> Any:
    """An `Optimizer`, or what has its three functions."""
    if all(callable(getattr(value, field, None)) for field in Optimizer._fields):
        return value
    raise refuse(name, "an optimizer such as training.optimizer(1e-3)", value)


@checked(
    learning_rate=number(above=0),
    warmup_steps=count(0),
    total_steps=count(1),
    final_scale=number(0, 1),
    rounds=count(1),
)
def warmup_cosine(
    learning_rate: float, warmup_steps: int, total_steps: int, final_scale: float = 0.0, rounds: int = 1
) -> Callable[[Int[Array, ""]], Float[Array, ""]]:
    """The learning rate as a function of the number n of updates already done.

        n < W:   lr (n + 1) / W
        n >= W:  lr (f + (1 - f) (1 + cos(pi (n - W) / (N - W))) / 2)

    with W = `warmup_steps`, N = `total_steps` and f = `final_scale` (f = 1 keeps the rate constant after the
    warm-up). The first update has the rate lr / W and not 0: a step with rate 0 would be a wasted one.

    Of several `rounds` each is such a curve of N = total_steps // rounds updates; the last is longer where
    these do not come out even.

    Source: Loshchilov and Hutter 2017 (SGDR, eq. 5). Raises `InvalidArgumentError`.
    """
    length = total_steps // rounds
    if not 0 <= warmup_steps <= length or not length:
        name = "total_steps" if rounds == 1 else "total_steps // rounds"
        raise InvalidArgumentError(f"warmup_steps must be in [0, {name} = {length}], got {warmup_steps}")
    of_last = max(total_steps - (rounds - 1) * length - warmup_steps, 1)

    def schedule(step):
        n, after = jnp.asarray(step, jnp.float32), of_last
        if rounds > 1:
            number = jnp.minimum(jnp.floor(n / length), rounds - 1)
            n = n - number * length
            after = jnp.where(number < rounds - 1, max(length - warmup_steps, 1), of_last)
        rising = (n + 1.0) / max(warmup_steps, 1)
        progress = jnp.clip((n - warmup_steps) / after, 0.0, 1.0)
        falling = final_scale + (1.0 - final_scale) * 0.5 * (1.0 + jnp.cos(math.pi * progress))
        return learning_rate * jnp.where(n < warmup_steps, rising, falling)

    return schedule


@checked(
    learning_rate=number(above=0),
    warmup_steps=count(0),
    total_steps=count(1),
    weight_decay=number(0),
    max_grad_norm=optional(number(above=0)),
    b1=number(0, below=1),
    b2=number(0, below=1),
    eps=number(0),
    final_scale=number(0, 1),
    name=choice("optimizer", OPTIMIZERS),
    rounds=count(1),
)
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
    name: str = "adamw",
    rounds: int = 1,
) -> Optimizer:
    """An optimizer with the rate of `warmup_cosine` and gradients clipped to a global norm. The usual, AdamW:

        g <- g min(1, max_grad_norm / |g|)          (|g| over all gradients; None: no clipping)
        m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g^2
        p <- p - lr (m_hat / (sqrt(v_hat) + eps) + weight_decay p)

    Arrays of two or more dimensions decay; biases and the scales of norms do not, those of a scan of blocks
    neither. With `weight_decay = 0` this is Adam.

    Other values of `name`, each from optax:

    - "lion": a tenth to a third of AdamW's rate, with as much more weight decay; its authors have b2 = 0.99.
    - "muon": for the matrices inside blocks, AdamW for the rest (`jaxldm.training.kinds.muon_axes`), at
      AdamW's rates; its matrices decay.
    - "schedule_free_adamw": the rate stays constant after the warm-up. `state.evaluation_params` is the
      average that it keeps, so that a moving average is not needed; b1 > 0.
    - "prodigy": finds the rate itself, `learning_rate` is a factor of it: give 1. All arrays decay.

    Sources: Kingma and Ba 2015, Algorithm 1; Loshchilov and Hutter 2019, Algorithm 2; Pascanu et al. 2013.
    Raises `InvalidArgumentError` for numbers outside their range.

    >>> import jax.numpy as jnp
    >>> adam = optimizer(1e-3, warmup_steps=10, total_steps=100)
    >>> float(adam.learning_rate(0)), float(adam.learning_rate(9)), float(adam.learning_rate(100))
    (0.00010000000474974513, 0.0010000000474974513, 0.0)
    """
    constant = name == "schedule_free_adamw"
    last = 1.0 if constant else final_scale
    schedule = warmup_cosine(learning_rate, warmup_steps, total_steps, last, rounds)
    if name == "adamw":
        return adamw(schedule, b1, b2, eps, weight_decay, max_grad_norm)
    if constant and b1 == 0:
        raise InvalidArgumentError("b1 must be > 0 for schedule_free_adamw, got 0")
    inner = NAMED[name](Settings(schedule, b1, b2, eps, weight_decay))

    def update(gradients, state, params):
        clip = _clip(gradients, max_grad_norm)
        with optax_promotion():
            return inner.update(jax.tree.map(lambda g: clip * g, gradients), state, params)

    return Optimizer(inner.init, update, schedule)


def _clip(gradients: Any, max_grad_norm: float | None) -> Any:
    """The factor of the gradients with which their norm is not above this."""
    return 1.0 if max_grad_norm is None else jnp.minimum(1.0, max_grad_norm / optax.tree.norm(gradients))


def adamw(
    schedule: Callable[[Any], Any],
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    max_grad_norm: float | None,
) -> Optimizer:
    """The equations of `optimizer` for any learning rate `schedule(number of finished updates)`.

    What is the same for all arrays is computed once, as a scalar. What is left for each array is so little
    that it compiles sooner than the same transformations as an `optax.chain`
    (`experiments/benchmarks/train_step_compile.py`).
    """

    def init(params):
        zeros = [jax.tree.map(jnp.zeros_like, params) for _ in range(2)]
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), *zeros)

    def update(gradients, state, params):
        count = cast(Any, optax.safe_increment(state.count))
        n, rate = count.astype(jnp.float32), schedule(state.count)
        clip = _clip(gradients, max_grad_norm)
        rate_m, scale_v = rate / (1.0 - b1**n), 1.0 / (1.0 - b2**n)
        mu = jax.tree.map(lambda g, m: b1 * m + (1.0 - b1) * (clip * g), gradients, state.mu)
        nu = jax.tree.map(lambda g, v: b2 * v + (1.0 - b2) * jnp.square(clip * g), gradients, state.nu)

        def step(names, m, v, p):
            adam = -rate_m * m / (jnp.sqrt(scale_v * v) + eps)
            return adam - rate * weight_decay * p if weight_decay and decays(names, p) else adam

        return map_with_names(step, mu, nu, params), optax.ScaleByAdamState(count, mu, nu)

    return Optimizer(init, update, schedule)
