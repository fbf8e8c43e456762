"""A model of a few numbers for the tests of the loop: y = tanh(x W1) W2 + noise from the step's key."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxldm.training.optimizer import optimizer
from jaxldm.training.state import create_train_state
from jaxldm.training.step import make_train_step


class ToyBatches:
    """Five batches of 16 an epoch, in another order each epoch; pure in the step."""

    def __init__(self, nan_at=()):
        numbers = np.random.default_rng(0)
        self.x = numbers.normal(size=(80, 6)).astype(np.float32)
        self.y = np.sin(self.x.sum(axis=1, keepdims=True)).astype(np.float32)
        self.nan_at = nan_at  # steps

    def __len__(self):
        return 5

    def __getitem__(self, step):
        epoch, place = divmod(step, 5)
        order = np.random.default_rng((1, epoch)).permutation(80)[place * 16 : (place + 1) * 16]
        y = np.full_like(self.y[order], np.nan) if step in self.nan_at else self.y[order]
        return {"x": self.x[order], "y": y}


def loss_fn(params, state, batch, key):
    noise = 0.1 * jax.random.normal(key, batch["y"].shape)
    hidden = jnp.tanh(batch["x"] @ params["w1"])
    error = hidden @ params["w2"] + noise - batch["y"]
    return jnp.mean(error**2), {"largest": jnp.max(jnp.abs(error))}


def toy_params(width=8):
    k1, k2 = jax.random.split(jax.random.key(0))
    return {"w1": jax.random.normal(k1, (6, width)), "w2": jax.random.normal(k2, (width, 1))}


@functools.cache  # one function, so that jax.jit compiles it once for all the tests
def toy_step(num_steps, ema_decay):
    adam = optimizer(1e-2, warmup_steps=3, total_steps=num_steps, weight_decay=1e-2)
    return adam, make_train_step(loss_fn, adam, ema_decay)


def toy(num_steps=12, width=8, ema_decay=0.9):
    """A new state and the train step."""
    adam, train_step = toy_step(num_steps, ema_decay)
    return create_train_state(jax.random.key(7), toy_params(width), adam), train_step
