"""From noise to latents: the pure part of a text-to-image call, and what it is told."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from jaxldm import diffusion as D
from jaxldm.pipelines.fixed_batches import over_images
from jaxldm.pipelines.network import Network
from jaxldm.pipelines.schedulers import Sampler


class Settings(NamedTuple):
    """What all images of a call share. All of it is data to the compiled function."""

    grid: D.Grid
    guidance_scale: Float[Array, ""]
    guidance_rescale: Float[Array, ""]


class Rows(NamedTuple):
    """What each of N images has of its own; a part that is None is not there.

    Attributes:
      key: [N, 2], the numbers of its key.
      condition: arrays [N, ...] by the names of the network's arguments; "channels" are added to x.
      negative: the same for the branch to steer away from; None without guidance.
      latents: [N, h, w, c], x at the first row of the grid, in place of noise.
      image: [N, h, w, c], the latents of the image to start from, to be noised.
      known: [N, h, w, c], the latents that are put back after each step where `repaint` is 0.
      repaint: [N, h, w, 1].
    """

    key: UInt32[Any, "N 2"]
    condition: dict[str, Any]
    negative: dict[str, Any] | None
    latents: Float[Any, "N h w c"] | None = None
    image: Float[Any, "N h w c"] | None = None
    known: Float[Any, "N h w c"] | None = None
    repaint: Float[Any, "N h w 1"] | None = None


class Walk(NamedTuple):
    """What is compiled into a run, besides shapes; another value of it compiles anew.

    Attributes:
      sampler: solver and denoiser.
      ask: (network, x, t, **condition) -> its answer at the path's t.
      mix: (negative, positive, t, condition, settings) -> the two answers as one, under guidance.
      latent_shape: (h, w, c).
      key_kind: which random numbers.
      previews: how often x_0 is kept on the way.
      on_step, progress: told of each step.
    """

    sampler: Sampler
    ask: Callable[..., Any]
    mix: Callable[..., Any]
    latent_shape: tuple[int, int, int]
    key_kind: Any
    previews: int
    on_step: Callable[[Any, Any], None] | None
    progress: Callable[[Any, Any], None] | None


def walk(denoiser: Network, settings: Settings, rows: Rows, how: Walk) -> Float[Array, "N K h w c"]:
    """Latents of N images, and x_0 as it was seen on the way in K - 1 places, behind them. Pure; jit it."""
    keys, grid, solver = (
        jax.random.wrap_key_data(rows.key, impl=how.key_kind),
        settings.grid,
        how.sampler.solver,
    )
    denoise = how.sampler.make_denoiser(guided(denoiser, settings, rows, how))
    if rows.repaint is not None:
        solver = D.inpaint(solver, rows.known, 1 - rows.repaint)
    x = rows.latents
    if x is None:
        x = D.initial_noise(keys, (len(keys), *how.latent_shape), grid)
        x = x if rows.image is None else grid.alpha[0] * rows.image + x
    run = functools.partial(D.sample, keys, denoise, solver, grid, x, callback=how.on_step)
    if how.previews:
        latents, predictions = run(progress=how.progress, return_predictions=True)
        places = (jnp.arange(how.previews) + 1) * grid.num_steps // (how.previews + 1)
        predictions = jnp.moveaxis(predictions[places], 0, 1)
    else:
        latents, predictions = run(progress=how.progress), jnp.zeros((len(keys), 0, *how.latent_shape))
    if rows.repaint is not None:  # a grid that ends at sigma_min would leave its noise in the known part
        kept = (1 - rows.repaint) * (grid.t[-1] <= denoise.path.t_min).astype(jnp.float32)
        latents = kept * rows.known + (1 - kept) * latents
    return jnp.concatenate([latents[:, None], predictions], axis=1)


def guided(
    denoiser: Network, settings: Settings, rows: Rows, how: Walk
) -> Callable[[Any, Any], Float[Array, "N h w out"]]:
    """`predict(x, t)`: the network's answer, under classifier-free guidance where there is a negative.

    Of a network that learned its variance the prediction alone is guided; the variance, where the solver
    wants it, is the one under the condition (Saharia et al. 2022, section 2.2, as published models do it).
    """
    channels = how.latent_shape[-1]

    def network(x, t, condition):
        condition = dict(condition)
        beside = condition.pop("channels", None)
        x = x if beside is None else jnp.concatenate([x, beside], axis=-1)
        return how.ask(denoiser, x, t, **condition)

    def predict(x, t):
        if rows.negative is None:
            answer = network(x, t, rows.condition)
        else:
            negative, answer = branches.ask(x, t)
            positive = answer[..., :channels]
            mixed = how.mix(negative[..., :channels], positive, t, rows.condition, settings)
            answer = jnp.concatenate([mixed, answer[..., channels:].astype(mixed.dtype)], axis=-1)
        return answer if how.sampler.learned_variance else answer[..., :channels]

    if rows.negative is not None:
        branches = D.condition_branches(network, rows.condition, rows.negative)
    return predict


@functools.partial(jax.jit, static_argnames=("how", "mesh"))
def walk_on_devices(shared, rows, *, how, mesh):
    """`walk` of shared (denoiser, settings), with the images split over the devices of the mesh."""

    def on_one_device(shared, rows):
        return walk(*shared, rows, how)

    return over_images(on_one_device, mesh)(shared, rows)
