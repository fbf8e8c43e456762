"""From the arguments of a call of a pipeline to rows that slots can take.

A job runs the stages of the pipeline's own call up to the sampling loop: the same checks, defaults,
conditions, grid and keys, so that whatever `pipe(...)` would draw is what the slots draw.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from jaxldm import diffusion as D
from jaxldm.arguments import a_key, checked, function, instance, optional
from jaxldm.errors import InvalidArgumentError
from jaxldm.pipelines.call import Call
from jaxldm.pipelines.control_kinds import control_parts
from jaxldm.pipelines.pipeline import A_PIPELINE, Pipeline
from jaxldm.pipelines.sampling_run import Compiled, PerImage
from jaxldm.serving.embeddings import Embeddings
from jaxldm.serving.slots import Rows

MAX_STEPS = 1000  # of one image: the length of all tables of grids, so that one program serves every number


class Kind(NamedTuple):
    """What images must have in common to be in slots of one table. Hashable.

    Attributes:
        compiled: solver, guidance rule and shape of the latents.
        structure: of the rows: one or two branches of guidance, names of conditions.
        shapes: (shape, dtype) of each array of a row.
    """

    compiled: Compiled
    structure: Any
    shapes: tuple[tuple[tuple[int, ...], str], ...]


class Job(NamedTuple):
    """The images of one call, before the first step.

    Attributes:
        kind: which slots can take them.
        rows: arrays [N, ...] on the host.
        num_images: N.
        num_steps: of each image.
        evaluations: how many rows of the network's batch a step of an image takes: 2 under guidance.
        start: [N, h, w, c], latents of images to start from; None: noise.
    """

    kind: Kind
    rows: Rows
    num_images: int
    num_steps: int
    evaluations: int
    start: Float[np.ndarray, "N h w c"] | None = None

    @property
    def cost(self) -> int:
        """Rows of the network's batch that one image takes in all: what fairness counts by."""
        return self.num_steps * self.evaluations


class Loop(NamedTuple):
    """What a family's `denoise` is given, in its order."""

    pipe: Pipeline
    call: Call
    run: tuple[Any, D.Grid]
    guidance_scale: float
    keys: Any
    condition: tuple[Any, Any]
    start: Any
    latent_shape: tuple[int, int, int]


AN_ENCODER = optional(function("(pipe, request)"))


@checked(pipe=A_PIPELINE, key=a_key, encode=AN_ENCODER)
def prepare(
    pipe: Pipeline, key: Any, *prompts: Any, encode: Callable[..., Any] | None = None, **options: Any
) -> Job:
    """The job of the call pipe(key, *prompts, **options).

    Args:
        pipe: of any family whose call is one sampling loop.
        key: as in the call.
        encode: in place of the family's, with the same arguments: one that remembers, see `sharing`.

    Raises:
        InvalidArgumentError, UnknownNameError, DataError: as the call itself; a family that samples in
            another way, a mask, latents to start from, more than `MAX_STEPS` steps.
    """
    family = pipe.family._replace(denoise=_stop, encode=encode or pipe.family.encode)
    loop = dataclasses.replace(pipe, family=family)(key, *prompts, **options | {"output": "latents"})
    if not isinstance(loop, Loop):
        raise InvalidArgumentError(
            f"a model of the family {pipe.family.name} is not one sampling loop and cannot share its steps"
        )
    return job_of(loop)


def _stop(*arguments: Any) -> tuple[Loop, None]:
    """In place of a family's `denoise`: what it was given."""
    return Loop(*arguments), None


def job_of(loop: Loop) -> Job:
    """The job of what a family's `denoise` was given.

    Raises:
        InvalidArgumentError: a mask, latents to start from, more than `MAX_STEPS` steps.
    """
    pipe, (sampler, grid), (cond, uncond) = loop.pipe, loop.run, loop.condition
    start = loop.start.image
    if any(part is not None for part in loop.start._replace(image=None)):
        raise InvalidArgumentError("slots start from noise or an image: leave mask_image and latents out")
    if loop.call.cache is not None:
        raise InvalidArgumentError("slots share their steps, each at another one: leave the cache out")
    if control_parts(pipe.parts):
        raise InvalidArgumentError("slots take no control images: serve the model without control networks")
    if loop.call.token_merging is not None:
        raise InvalidArgumentError(
            "slots share one network: leave token_merging out, and serve pipelines.with_token_merging(pipe)"
        )
    num_steps, num_images = int(D.steps_in(grid)), len(loop.keys.data)
    if num_steps > MAX_STEPS:
        raise InvalidArgumentError(f"num_inference_steps must be at most {MAX_STEPS}, got {num_steps}")
    image = PerImage(loop.keys.data, *jax.tree.map(np.asarray, (cond, uncond)))
    scales = loop.guidance_scale, loop.call.guidance_rescale
    scale, rescale = (np.full(num_images, scale, np.float32) for scale in scales)
    rows = Rows(_grid_rows(grid, num_steps, num_images), scale, rescale, image)
    guided_channels = pipe.options.get("guided_channels") or loop.latent_shape[-1]
    compiled = Compiled(sampler, pipe.family.combine, loop.latent_shape, guided_channels, loop.keys.impl)
    leaves, structure = jax.tree.flatten(image)
    shapes = tuple((leaf.shape[1:], str(leaf.dtype)) for leaf in leaves)
    evaluations = 1 if uncond is None else 2
    start = None if start is None else np.asarray(start, np.float32)
    return Job(Kind(compiled, structure, shapes), rows, num_images, num_steps, evaluations, start)


def _grid_rows(grid: D.Grid, num_steps: int, num_images: int) -> D.Grid:
    """The rows of a grid for each image, with the last one repeated: all tables are of one length."""

    def column(values: Any) -> np.ndarray:
        padded = np.pad(np.asarray(values, np.float32)[: num_steps + 1], (0, MAX_STEPS - num_steps), "edge")
        return np.tile(padded, (num_images, 1))

    numbers = (np.full(num_images, number, np.int32) for number in (num_steps, int(grid.start)))
    return D.Grid(*map(column, grid[:3]), *numbers)


@checked(pipe=A_PIPELINE, cache=instance(Embeddings, "serving.Embeddings(max_bytes)"))
def sharing(pipe: Pipeline, cache: Embeddings) -> Callable[..., Any]:
    """The family's `encode`, which asks the cache first for what texts were encoded to.

    Args:
        cache: of embeddings; labels are not worth remembering.
    """

    @functools.wraps(pipe.family.encode)
    def encode(pipe: Pipeline, request: Any, **own: Any) -> Any:
        if not all(isinstance(prompt, str) for prompt in request.prompts):
            return original(pipe, request, **own)
        negatives = None if request.negatives is None else tuple(request.negatives)
        facts = tuple(request.prompts), negatives, request.size, sorted(own.items())
        # Of any text as many bytes: those of a small model's embeddings may be fewer than its own.
        key = hashlib.sha256(repr(facts).encode()).digest()
        # Without keys: what is remembered for one seed must be right for all.
        return cache.get(key, lambda: original(pipe, request._replace(keys=None), **own))

    original = pipe.family.encode
    return encode
