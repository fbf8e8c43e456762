"""A small network of points on a plane and a few numbers, and its training as one compiled loop a stage."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Params = Any
# (params, moving average, params at the start of the stage, key, progress from 0 to 1) -> loss
Loss = Callable[[Params, Params, Params, Any, Any], Any]
WAVES = (1.0, 2.0, 4.0)  # of a number's embedding: smooth, as derivatives by the time need it
WIDTH, DEPTH = 64, 3


def init_network(key: Any, numbers: int, outputs: int = 2) -> Params:
    """Parameters of a network of a point and so many numbers."""
    widths = [2 + numbers * (1 + 2 * len(WAVES)), *[WIDTH] * DEPTH, outputs]
    keys = jax.random.split(key, len(widths) - 1)
    return [
        {"kernel": jax.random.normal(k, (i, o)) / jnp.sqrt(i), "bias": jnp.zeros(o)}
        for k, i, o in zip(keys, widths[:-1], widths[1:], strict=True)
    ]


def network(params: Params, x: Any, *numbers: Any) -> Any:
    """x [B, 2], numbers [B] each -> [B, outputs]."""
    features = [x]
    for number in numbers:
        n = jnp.broadcast_to(jnp.asarray(number, x.dtype), x.shape[:1])[:, None]
        features += [n, *(wave(k * n) for k in WAVES for wave in (jnp.sin, jnp.cos))]
    h = jnp.concatenate(features, axis=-1)
    for layer in params[:-1]:
        h = jax.nn.silu(h @ layer["kernel"] + layer["bias"][None])
    return h @ params[-1]["kernel"] + params[-1]["bias"][None]


class Training(NamedTuple):
    """How a student is trained.

    Attributes:
        updates: in all stages together.
        rate: of Adam, which falls to 0 as a cosine.
        ema: decay of the moving average that losses are given; at first less, (1 + n) / (10 + n).
        slower: factor of the rate of some of the parameters, by their name.
        averaged: whether the moving average is the finished student, or the parameters themselves.
        betas: decays of Adam's averages of the gradient and of its square.
    """

    updates: int = 4000
    rate: float = 4e-3
    ema: float = 0.95
    slower: Mapping[str, float] = {}
    averaged: bool = False
    betas: tuple[float, float] = (0.9, 0.999)


def train(key: Any, params: Params, stages: Sequence[Loss], how: Training) -> Params:
    """The parameters after equally many updates of each loss."""
    optimizer = optax.adam(optax.cosine_decay_schedule(how.rate, how.updates), *how.betas)
    each = how.updates // len(stages)
    slower = tuple(how.slower.items())
    state = (params, params, optimizer.init(params))
    for number, loss in enumerate(stages):
        step = functools.partial(_stage, loss, optimizer, each, (how.ema, how.updates), slower)
        state = jax.jit(step)(
            state, jax.random.fold_in(key, number), number * each / how.updates, each / how.updates
        )
    return state[1] if how.averaged else state[0]


def _stage(loss, optimizer, updates, ema, slower, state, key, begin, share):
    start, (decay, total) = state[0], ema

    def update(state, i):
        params, average, moments = state
        progress = begin + share * i.astype(jnp.float32) / updates
        gradients = jax.grad(loss)(params, average, start, jax.random.fold_in(key, i), progress)
        changes, moments = optimizer.update(gradients, moments)
        for name, factor in slower:
            changes[name] = jax.tree.map(lambda change, factor=factor: factor * change, changes[name])
        params = optax.apply_updates(params, changes)
        n = progress * total
        average = optax.incremental_update(params, average, 1 - jnp.minimum(decay, (1 + n) / (10 + n)))
        return (params, average, moments), None

    return jax.lax.scan(update, state, jnp.arange(updates))[0]
