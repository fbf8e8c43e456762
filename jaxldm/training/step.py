"""One update as a pure function, and the same function compiled for a mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxldm.arguments import checked, function, number, optional
from jaxldm.errors import InvalidArgumentError
from jaxldm.training.mesh import A_MESH, batch_sharding, replicated, state_shardings
from jaxldm.training.optimizer import AN_OPTIMIZER, Optimizer
from jaxldm.training.state import Params, TrainState

Batch = Any  # a dict of arrays with the examples along axis 0
Metrics = dict[str, Float[Array, ""]]
LossFunction = Callable[[Params, TrainState, Batch, PRNGKeyArray], tuple[Float[Array, ""], Metrics]]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def ema_decay_at(ema_decay: float, step: int | Int[Array, ""]) -> Float[Array, ""]:
    """The decay after `step` finished updates: min(ema_decay, (1 + step) / (10 + step)).

    The second term lets the average forget the random start quickly; it no longer matters after about
    9 / (1 - ema_decay) steps. Source: the `num_updates` rule of TensorFlow's ExponentialMovingAverage.
    """
    n = jnp.asarray(step, jnp.float32)
    return jnp.minimum(ema_decay, (1.0 + n) / (10.0 + n))


def update_ema(ema_params: Params, params: Params, decay: Float[Array, ""]) -> Params:
    """ema <- decay ema + (1 - decay) params, written as a step towards `params` so that equal stays equal."""
    return jax.tree.map(lambda average, new: average + (1.0 - decay) * (new - average), ema_params, params)


@checked(
    loss_fn=function("(params, state, batch, key) -> (loss, metrics)"),
    optimizer=AN_OPTIMIZER,
    ema_decay=optional(number(0, 1)),
)
def make_train_step(loss_fn: LossFunction, optimizer: Optimizer, ema_decay: float | None = None) -> TrainStep:
    """Return a pure `train_step(state, batch) -> (state, metrics)`.

    Args:
        loss_fn: `loss_fn(params, state, batch, key) -> (loss, metrics)`: a float32 scalar, the mean over the
            batch, and a dict of numbers to log. Gradients are taken with respect to `params`, which are
            `state.params`; of the state it may use `step` (for schedules inside the loss) and `frozen`.
            `key` is `fold_in(state.key, state.step)`.
        optimizer: see `jaxldm.training.optimizer`.
        ema_decay: of the moving average after each update; the state must then hold `ema_params`.

    Returns:
        The step. Its metrics are `loss`, `grad_norm` (before clipping), `learning_rate` and those of the
        loss.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        (loss, aux), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params, state, batch, key)
        if loss.shape != () or loss.dtype != jnp.float32:
            raise InvalidArgumentError(
                f"loss_fn must return a float32 scalar, got shape {list(loss.shape)} of {loss.dtype}: write "
                "jnp.mean(loss.astype(jnp.float32))"
            )
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = state.ema_params
        if ema_decay is not None:
            ema_params = update_ema(ema_params, params, ema_decay_at(ema_decay, state.step))
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(gradients),
            "learning_rate": optimizer.learning_rate(state.step),
            **aux,
        }
        return state.replace(
            step=state.step + 1, params=params, opt_state=opt_state, ema_params=ema_params
        ), metrics

    return train_step


@checked(train_step=function("(state, batch) -> (state, metrics)"), mesh=A_MESH)
def compile_train_step(train_step: TrainStep, mesh: Mesh) -> TrainStep:
    """`jax.jit` of a train step over a mesh: state as `state_shardings` says, batch split, metrics whole.

    Give it a state that lies there already, `jax.device_put(state, state_shardings(mesh, state))`. The state
    is donated: its memory is used for the new one, and the old one must not be touched afterwards.
    """

    def placed_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        shardings = state_shardings(mesh, state)
        new_state, metrics = train_step(state, batch)
        return jax.lax.with_sharding_constraint(new_state, shardings), metrics

    return jax.jit(
        placed_step,
        donate_argnums=0,
        in_shardings=(None, batch_sharding(mesh)),
        out_shardings=(None, replicated(mesh)),
    )
