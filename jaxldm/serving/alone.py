"""A pipeline that draws alone what a server draws in company, to the last bit."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from jaxldm.arguments import checked, count
from jaxldm.errors import InvalidArgumentError
from jaxldm.pipelines.pipeline import A_PIPELINE, Pipeline
from jaxldm.serving.engine import Table
from jaxldm.serving.jobs import Loop, job_of


@checked(pipe=A_PIPELINE, slots=count(1, 1024))
def as_served(pipe: Pipeline, slots: int) -> Pipeline:
    """The pipeline with the compiled step of a server in place of its own sampling loop.

    Its calls draw what a server draws that has so many slots, to the last bit, whatever else that drew at the
    time. A pipeline's own loop computes the same in another order of rounding: all its images have one grid.

    Args:
        pipe: of any family whose call is one sampling loop.
        slots: K, as the server's answer says.

    Raises:
        InvalidArgumentError: by its calls, for what a server does not do: previews, callbacks, a mask or
            latents to start from.

    >>> import jax
    >>> from jaxldm import pipelines, serving                                            # doctest: +SKIP
    >>> pipe = serving.as_served(pipelines.load("runs/mini-ldm"), slots=16)              # doctest: +SKIP
    >>> images = pipe(jax.random.key(7), [3], guidance_scale=3.0)                        # doctest: +SKIP
    """
    decode = pipe.family.decode

    def decode_so_many(pipe: Pipeline, latents: Any, **options: Any) -> Any:
        return decode(pipe, latents, **options | {"batch_size": slots})

    denoise = functools.partial(_denoise, slots=slots)
    family = pipe.family._replace(denoise=denoise, decode=decode_so_many)
    return dataclasses.replace(pipe, family=family)


def _denoise(*arguments: Any, slots: int) -> tuple[Float[np.ndarray, "N h w c"], None]:
    """In place of a family's `denoise`: so many images at once, each from its first step to its last."""
    loop = Loop(*arguments)
    call = loop.call
    if call.previews or call.on_step or call.on_x0 or call.progress or call.weak_guidance:
        raise InvalidArgumentError(
            "as served there are no previews, weak_guidance, on_step, on_x0 and progress: leave them out"
        )
    job = job_of(loop)
    device = jax.local_devices()[0] if call.devices is None else call.devices[0]
    table = Table(job.kind, job.rows, slots, device)
    network = jax.device_put(loop.pipe.denoiser, device)
    latents = np.zeros((job.num_images, *loop.latent_shape), np.float32)
    for first in range(0, 0 if call.compile_only else job.num_images, slots):
        for image in range(first, min(first + slots, job.num_images)):
            table.begin(job, image, None)
        while table.busy:
            table.advance(network)
            for drawn in table.finish_step()[1]:
                latents[drawn.image] = drawn.latents
    return latents, None
