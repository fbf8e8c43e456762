"""Optimizers other than AdamW, each from optax: what is set here is what optax cannot know."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxldm.training.kinds import decay_mask, map_with_names, muon_axes, three_apart


class Settings(NamedTuple):
    """The arguments of `jaxldm.training.optimizer` that concern a single update."""

    schedule: Callable[[Any], Any]
    b1: float
    b2: float
    eps: float
    weight_decay: float


def lion(settings: Settings) -> optax.GradientTransformation:
    """Chen et al. 2023, Algorithm 2."""
    schedule, b1, b2, _, weight_decay = settings
    return optax.lion(schedule, b1, b2, weight_decay=weight_decay, mask=decay_mask)


def muon(settings: Settings) -> optax.GradientTransformation:
    """Jordan et al. 2024 for the matrices of `muon_axes`, scaled to AdamW's size as Liu et al. 2025."""
    inner = optax.contrib.muon(
        settings.schedule,
        weight_decay=settings.weight_decay,
        adam_b1=settings.b1,
        adam_b2=settings.b2,
        eps=settings.eps,
        muon_weight_dimension_numbers=muon_axes,
        consistent_rms=0.2,
    )

    def init(params):
        return inner.init(map_with_names(three_apart, params))

    def update(updates, state, params=None):
        parts = (map_with_names(three_apart, tree) for tree in (updates, params))
        moved, state = inner.update(next(parts), state, next(parts))
        return jax.tree.map(lambda update, p: update.reshape(p.shape), moved, params), state

    return optax.GradientTransformation(init, update)


def schedule_free_adamw(settings: Settings) -> optax.GradientTransformation:
    """Defazio et al. 2024, Algorithm 1: gradients at y = (1 - b1) z + b1 x; x is the average to draw with."""
    schedule, b1, b2, eps, weight_decay = settings
    base = optax.chain(
        optax.scale_by_rms(decay=b2, eps=eps, eps_in_sqrt=False, bias_correction=True),
        optax.add_decayed_weights(weight_decay, decay_mask),
        optax.scale_by_learning_rate(schedule),
    )
    # optax counts from 1 in the weights of the average, from 0 in the steps
    return optax.contrib.schedule_free(base, lambda count: schedule(count - 1), b1)


def prodigy(settings: Settings) -> optax.GradientTransformation:
    """Mishchenko and Defazio 2023, Algorithm 4: the learning rate is a factor of the rate that it finds."""
    schedule, b1, b2, eps, weight_decay = settings
    inner = optax.contrib.prodigy(
        schedule, (b1, b2), eps=eps, weight_decay=weight_decay, safeguard_warmup=True
    )

    def init(params):  # it keeps them: a copy, as the train step overwrites its state
        return inner.init(jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), params))

    return optax.GradientTransformation(init, inner.update)


@contextlib.contextmanager
def optax_promotion():
    """optax counts on JAX's own rules for numbers of different types, whatever the process has set."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


NAMED: dict[str, Callable[[Settings], optax.GradientTransformation]] = {
    "lion": lion,
    "muon": muon,
    "schedule_free_adamw": schedule_free_adamw,
    "prodigy": prodigy,
}


def evaluated(params: Any, opt_state: Any) -> Any:
    """The parameters to draw with, of an optimizer that keeps its own average of them; else as they are."""
    if isinstance(opt_state, optax.contrib.ScheduleFreeState):
        with optax_promotion():
            return optax.contrib.schedule_free_eval_params(opt_state, params)
    return params
