"""What a call with a cache is checked for, before its prompts are encoded and anything is compiled."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxldm import diffusion as D
from jaxldm.models.denoising_network import check_reuse
from jaxldm.pipelines.network import Network
from jaxldm.schedulers import Sampler


def check_cache(network: Network, cache: D.Cache, sampler: Sampler, grid: D.Grid) -> None:
    """Raises `InvalidArgumentError` for a cache that the network, the solver or the steps do not fit."""
    cache.check_steps(int(D.steps_in(grid)))
    check_reuse(network.module, network.params, cache)

    def nothing(cache: Any, memory: Any, i: Any, x: Any, t: Any, *condition: Any) -> tuple[Any, Any]:
        return jnp.concatenate([x] * (2 if sampler.learned_variance else 1), axis=-1), ()

    denoise = D.cached_denoiser(nothing, sampler.denoiser, cache)

    def step(x: Any) -> Any:
        solver, keys = D.cached(sampler.solver, denoise), D.image_keys(jax.random.key(0), len(x))
        return D.sample_step(keys, denoise, solver, grid, solver.init(x), jnp.int32(0))

    # Refuses a solver that calls the network twice.
    jax.eval_shape(step, jax.ShapeDtypeStruct((1, 2, 2, 1), jnp.float32))
