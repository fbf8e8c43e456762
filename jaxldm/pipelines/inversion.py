"""From an image back to the noise that a model draws it from: `invert`."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from jaxldm import diffusion as D
from jaxldm.arguments import checked, count
from jaxldm.errors import InvalidArgumentError
from jaxldm.pipelines.call import Call
from jaxldm.pipelines.generate import STEPS_AT_ONCE
from jaxldm.pipelines.inputs import InitialLatents
from jaxldm.pipelines.pipeline import A_PIPELINE, Pipeline
from jaxldm.schedulers import Sampler

# Options of a call that an inversion has itself, or that it cannot have.
_OWN = ("image", "latents", "mask_image", "strength", "solver", "eta", "variance", "output", "key")


@checked(pipe=A_PIPELINE, iterations=count(1))
def invert(
    pipe: Pipeline, image: Any, *prompts: Any, iterations: int = 5, **options: Any
) -> Float[np.ndarray, "N h w c"]:
    """The latents [N, h, w, c] from which the model draws these images with DDIM.

        noise = pipelines.invert(pipe, image, "a cat", num_inference_steps=50, guidance_scale=1)
        again = pipe(key, "a cat", latents=noise, solver="ddim", num_inference_steps=50, guidance_scale=1)

    Another prompt, or more guidance, in the second call changes the picture and keeps what it can of it. The
    same options give what the autoencoder makes of the image, as far as the inversion converged.

    Args:
        pipe: of any family whose call is one sampling loop.
        image: of any size and kind that `image=` of a call takes: one, or one for each image.
        prompts: as of the call: prompts and negative prompts, or labels.
        iterations: evaluations for each step; 1 is DDIM inversion as published. See
            `D.solvers.ddim_inverse`.
        options: as of the call.

    Raises:
        InvalidArgumentError: an option that an inversion has itself, a model that draws in another way, or
            was trained for inpainting.
        UnknownNameError, DataError: as the call.
    """
    given = next((name for name in _OWN if name in options), None)
    if given is not None:
        raise InvalidArgumentError(f"an inversion has no {given}: leave it out")
    if pipe.few_steps is not None:
        raise InvalidArgumentError(
            f"{pipe.few_steps.this} draws in few steps, which cannot be gone backwards: invert with a "
            "model of many steps"
        )
    if getattr(pipe.latent_spec, "takes_mask", False):
        raise InvalidArgumentError("this network was trained for inpainting: invert with one that was not")
    family = pipe.family

    def grid(pipe: Pipeline, call: Call, *rest: Any) -> tuple[Sampler, D.Grid]:
        sampler, rows = family.grid(pipe, dataclasses.replace(call, strength=None), *rest)
        number = int(D.steps_in(rows)) + 1
        rising = D.Grid(*(np.asarray(column)[:number][::-1].copy() for column in rows[:3]))
        padded = D.pad(rising, -(-(number - 1) // STEPS_AT_ONCE) * STEPS_AT_ONCE)
        return sampler._replace(solver=D.solvers.ddim_inverse(iterations)), padded

    def start(*arguments: Any) -> InitialLatents:
        return InitialLatents(latents=family.initial_latents(*arguments).image)

    backwards = dataclasses.replace(pipe, family=family._replace(grid=grid, initial_latents=start))
    return backwards(jax.random.key(0), *prompts, image=image, solver="ddim", output="latents", **options)
