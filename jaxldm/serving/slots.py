"""K slots of one network and one compiled step for all of them: pure functions of arrays.

A slot draws one image. Each has its own grid and place in it, its own key, guidance scale, condition and
solver state, so that images begin and end between any two steps, whatever the others do. All of it is data:
nothing compiles again.

The solver's step is mapped over the slots by `vmap`; where it calls the denoiser, all slots hand in their x
and the network is called once, on K rows (2K under guidance). No number of one slot enters the arithmetic of
another: an image is the same to the last bit in any company.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxldm import diffusion as D
from jaxldm.pipelines.network import Network
from jaxldm.pipelines.sampling_run import Compiled, PerCall, PerImage, guided

SLOTS = "slots"  # the axis of `vmap`


class Rows(NamedTuple):
    """What the images of K slots were given; every array has a row for each.

    Attributes:
        grid: t, alpha, sigma [K, rows], num_steps [K] and start [K].
        guidance_scale: [K].
        guidance_rescale: [K].
        image: keys and conditions, see `PerImage`.
    """

    grid: D.Grid
    guidance_scale: Float[Any, " K"]
    guidance_rescale: Float[Any, " K"]
    image: PerImage


class Slots(NamedTuple):
    """K images on their way.

    Attributes:
        rows: what they were given.
        state: the solver's, of each slot: arrays [K, ...], x [K, 1, h, w, c].
        step: [K], the step that each takes next; `rows.grid.num_steps` where a slot has none left.
    """

    rows: Rows
    state: Any
    step: Int[Any, " K"]


def empty(size: int, example: Rows, compiled: Compiled) -> Slots:
    """`size` slots without images.

    Args:
        example: the row of one image, of any number of rows, for shapes and types.
        compiled: what the step is compiled for.
    """
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf)[1:], leaf.dtype), example)
    state = jax.eval_shape(functools.partial(_first_state, compiled=compiled), one)
    zeros = functools.partial(jax.tree.map, lambda leaf: np.zeros((size, *leaf.shape), leaf.dtype))
    rows = zeros(one)
    # A row that can be divided by: what an empty slot computes is dropped, and should not be NaN.
    grid = rows.grid._replace(alpha=rows.grid.alpha + 0.5, sigma=rows.grid.sigma + 0.5, t=rows.grid.t + 0.5)
    return Slots(rows._replace(grid=grid), zeros(state), np.zeros(size, np.int32))


@functools.partial(jax.jit, static_argnames="compiled", donate_argnames="slots")
def join(
    slots: Slots,
    slot: Int[Any, ""],
    row: Rows,
    start: Float[Any, "h w c"] | None = None,
    *,
    compiled: Compiled,
) -> Slots:
    """The slots with an image in one of them, at its first row: noise of its own key.

    Args:
        slot: which one, a traced number.
        row: the image's row, arrays without the axis of the slots.
        start: latents of the image to start from, which are noised; no part of the rows, so that one step
            serves both.
    """
    state = _first_state(row, start, compiled=compiled)

    def put(old, new):
        return old.at[slot].set(new)

    step = slots.step.at[slot].set(0)
    return Slots(jax.tree.map(put, slots.rows, row), jax.tree.map(put, slots.state, state), step)


class Pictures(NamedTuple):
    """What a step leaves to look at.

    Attributes:
        x: [K, h, w, c], at the row that each image has come to.
        x_0: [K, h, w, c], the clean images as the network saw them at the row before.
    """

    x: Float[Array, "K h w c"]
    x_0: Float[Array, "K h w c"]


@functools.partial(jax.jit, static_argnames="compiled", donate_argnames="slots")
def advance(network: Network, slots: Slots, *, compiled: Compiled) -> tuple[Slots, Pictures]:
    """One step of every image that has steps left; the other slots stay as they are."""
    return step_of_slots(network, slots, compiled)


def step_of_slots(network: Network, slots: Slots, compiled: Compiled) -> tuple[Slots, Pictures]:
    """`advance`, not compiled."""
    rows, left = slots.rows, slots.step < slots.rows.grid.num_steps
    per_call = PerCall(rows.grid, rows.guidance_scale, rows.guidance_rescale)
    denoiser = compiled.sampler.denoiser(guided(network, per_call, rows.image, compiled))
    denoise = once_for_all(denoiser)

    def one_slot(state, grid, step, key):
        keys = jax.random.wrap_key_data(key[None], impl=compiled.key_impl)
        return D.sample_step(keys, denoise, compiled.sampler.solver, grid, state, step)

    inputs = slots.state, rows.grid, slots.step, rows.image.key
    state, x_0 = jax.vmap(one_slot, axis_name=SLOTS)(*inputs)

    def keep(new, old):
        return jnp.where(left.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

    state = jax.tree.map(keep, state, slots.state)
    pictures = Pictures(state.x[:, 0], x_0[:, 0])  # x is not the state's: that gives its memory to the next
    return Slots(rows, state, slots.step + left.astype(slots.step.dtype)), pictures


def once_for_all(denoiser: D.Denoiser) -> D.Denoiser:
    """A denoiser of one slot's x [1, ...] that, mapped over the slots, calls the one of all slots once.

    Args:
        denoiser: of x [K, ...], t [K].
    """

    def of_one_slot(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        def call(x, t):
            results = function(jax.lax.all_gather(x[0], SLOTS), jax.lax.all_gather(t[0], SLOTS))
            slot = jax.lax.axis_index(SLOTS)
            return jax.tree.map(lambda rows: rows[slot][None], results)

        return call

    def any_slot(condition):
        return jax.lax.psum(jnp.asarray(condition, jnp.int32), SLOTS) > 0

    pairs = denoiser.with_variance, denoiser.with_unchanged
    variance, unchanged = (None if pair is None else of_one_slot(pair) for pair in pairs)
    function = of_one_slot(denoiser.function)
    return D.Denoiser(function, denoiser.path, variance, any_slot, with_unchanged=unchanged)


def _first_state(row: Rows, start: Any = None, *, compiled: Compiled) -> Any:
    """The solver's state of one image at the first row of its grid."""
    keys, shape = jax.random.wrap_key_data(row.image.key[None], impl=compiled.key_impl), compiled.latent_shape
    if start is None:
        x = compiled.sampler.initial_noise(keys, (1, *shape), row.grid)
    else:
        x = row.grid.alpha[0] * start[None] + D.initial_noise(keys, (1, *shape), row.grid)
    return compiled.sampler.solver.init(jnp.asarray(x, jnp.float32))
