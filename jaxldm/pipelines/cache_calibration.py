"""Calibration of caches: what TeaCache and MagCache have to know of a pipeline's network."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxldm import diffusion as D
from jaxldm import models
from jaxldm.arguments import a_key, checked
from jaxldm.errors import InvalidArgumentError
from jaxldm.pipelines.control import control_rows, controls_of
from jaxldm.pipelines.pipeline import A_PIPELINE, Pipeline
from jaxldm.pipelines.sampling_run import Compiled, PerCall, PerImage, denoiser_of


@checked(pipe=A_PIPELINE, key=a_key)
def calibrate_cache(pipe: Pipeline, key: Any, *prompts: Any, **options: Any) -> D.Calibration:
    """Draw the call pipe(key, *prompts, **options) computing every step, and watch the network.

    All its images are one batch: a few will do. The number of steps, solver and guidance should be those that
    the cache is for.

    Raises:
        InvalidArgumentError, UnknownNameError, DataError: as the call itself; a network that has nothing to
            reuse.

    >>> found = pipelines.calibrate_cache(pipe, key, ["a cat"], num_inference_steps=50)  # doctest: +SKIP
    >>> cache = D.caching.magcache(found.ratios, threshold=0.12)                         # doctest: +SKIP
    """
    for name in ("cache", "weak_guidance", "compile_only"):
        if options.get(name):
            raise InvalidArgumentError(
                f"a calibration is of the network computing every step: leave {name} out"
            )
    reached: list[Any] = []

    def stop(*arguments: Any) -> tuple[Any, None]:
        reached.extend(arguments)
        return arguments, None

    family = pipe.family._replace(denoise=stop)
    dataclasses.replace(pipe, family=family)(key, *prompts, **options | {"output": "latents"})
    if not reached:
        raise InvalidArgumentError(
            f"a model of the family {pipe.family.name} has nothing that a cache can reuse"
        )
    pipe, call, (sampler, grid), scale, keys, (cond, uncond), start, shape = reached
    if any(part is not None for part in start):
        raise InvalidArgumentError("a calibration starts from noise: leave image, mask_image and latents out")
    more, negative = control_rows(pipe, call, len(keys.data))
    cond, uncond = cond | more, None if uncond is None else uncond | negative
    scales, controls = (np.float32(scale), np.float32(call.guidance_rescale)), controls_of(pipe, call, grid)
    per_call = PerCall(grid, *scales, controls=controls)
    per_image = PerImage(keys.data, *jax.tree.map(jnp.asarray, (cond, uncond)))
    guided_channels = pipe.options.get("guided_channels") or shape[-1]
    compiled = Compiled(sampler, pipe.family.combine, shape, guided_channels, keys.impl)
    network = pipe.denoiser
    unet = isinstance(network.module, (models.UNet2DModel, models.UNet2DConditionModel))
    wrapped = keys.wrapped()
    return D.calibrate_cache(
        wrapped,
        models.caching_network(network.module, network.params),
        denoiser_of(network, per_call, per_image, compiled),
        sampler.solver,
        grid,
        sampler.initial_noise(wrapped, (len(keys.data), *shape), grid),
        blocks=not unet,
    )
