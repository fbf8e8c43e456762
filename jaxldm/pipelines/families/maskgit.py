"""Class labels to images by masked tokens, as trained here (MaskGIT: Chang et al. 2022).

    pipe = pipelines.load("runs/masked-digits")
    images = pipe(jax.random.key(0), [3, 7], num_images=16, guidance_scale=2.0)

The tokens are the grey levels of the pixels, so there is nothing to decode. No path, no solver:
`D.sample_tokens` takes the steps of an `Unmasking`. `latents=` and `output="latents"` are tokens, int32
[N, h, w]; the mask token (`pipe.mask_token()`) stands where nothing is known. To complete a part of an image:

    tokens = pipe.image_tokens(images)
    tokens[:, 14:] = pipe.mask_token()
    again = pipe(key, labels, latents=tokens)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np
from jaxtyping import Float, Int

from jaxldm import data, schedulers
from jaxldm import diffusion as D
from jaxldm.errors import CheckpointError, InvalidArgumentError
from jaxldm.models.config import height_width
from jaxldm.pipelines.call import SHARED, Call, Defaults, Request
from jaxldm.pipelines.families import class_to_image
from jaxldm.pipelines.family import Family, Folder
from jaxldm.pipelines.inputs import Inputs, LatentSpec, Size, check_rows, repeated
from jaxldm.pipelines.labels import cycle_labels
from jaxldm.pipelines.latents import computing_mesh, num_batches_at_once
from jaxldm.pipelines.network import Network
from jaxldm.pipelines.pipeline import Pipeline, read_call
from jaxldm.pipelines.tokens import (
    InitialTokens,
    as_tokens,
    check_mask_token,
    mask_token,
    unmask_tokens,
    unmasking,
)

MASKGIT_CLASS = "MaskGITPipeline"
TEMPERATURE = (4.5, 0.0)
# See `class_to_image.OPTIONS`.
OPTIONS = {"class_names": (), "default_guidance_scale": 2.0, "images_per_device": 16}


def maskgit(transformer: Network, mask_schedule: str = "cosine", **options: Any) -> Pipeline:
    """A pipeline of a network in memory.

    Args:
        transformer: (tokens [B, h, w], labels [B]) -> logits [B, h, w, V].
        mask_schedule: a name of `D.MASK_SCHEDULES`, that of the training.
        options: see `OPTIONS`.
    """
    scheduler = schedulers.masked_tokens_config(transformer.config.mask_token, mask_schedule)
    return Pipeline(MASKGIT, {"transformer": transformer, "scheduler": scheduler}, options)


def encode(
    pipe: Pipeline,
    request: Request,
    *,
    temperature: float | Sequence[float] = TEMPERATURE,
    mask_schedule: str | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The labels themselves, and the null class; nothing for a model without classes.

    Args:
        temperature: of the noise on the confidence, from the first step to the last, or one for all: for
            `steps`.
        mask_schedule: a name of `D.MASK_SCHEDULES`, for `steps`; default the folder's ("cosine").
    """
    return class_to_image.encode(pipe, request)


def steps(pipe: Pipeline, call: Call, size: Size) -> D.Unmasking:
    """The steps of a call, padded."""
    return unmasking(pipe, call, size, TEMPERATURE)


def read_tokens(pipe: Pipeline, call: Call, num_images: int) -> Inputs:
    """The tokens that a call starts from, checked."""
    if call.latents is None:
        return Inputs(pipe.default_size)
    tokens, shape = as_tokens(pipe, call.latents), pipe.latent_shape()[:2]
    check_rows(tokens, num_images, "latents")
    if tokens.shape[1:] != shape:
        given, wanted = ("x".join(map(str, sides)) for sides in (tokens.shape[1:], shape))
        raise InvalidArgumentError(f"latents are {given} tokens, {wanted} are needed")
    return Inputs(pipe.default_size, latents=tokens)


def initial_tokens(pipe: Pipeline, call: Call, inputs: Inputs, num_images: int) -> InitialTokens:
    """All masked, or the caller's."""
    mask = mask_token(pipe)
    if inputs.latents is None:
        tokens = np.full((num_images, *pipe.latent_shape()[:2]), mask, np.int32)
    else:
        tokens = repeated(inputs.latents, num_images)
    return InitialTokens(tokens, (tokens == mask).sum((1, 2), dtype=np.int32))


def decode(pipe: Pipeline, tokens: Int[Any, "N h w"], **options: Any) -> Float[np.ndarray, "N H W 1"]:
    """Images in [-1, 1] of tokens."""
    return data.from_grey_levels(np.asarray(tokens), pipe.transformer.config.codebook_size)


def image_tokens(pipe: Pipeline, images: Float[Any, "N H W 1"]) -> Int[np.ndarray, "N h w"]:
    """The tokens of images in [-1, 1]."""
    return data.to_grey_levels(np.asarray(images), pipe.transformer.config.codebook_size)


def defaults(pipe: Pipeline) -> Defaults:
    """12 steps; a model without classes cannot be guided."""
    scale = 1.0 if pipe.num_classes is None else pipe.options["default_guidance_scale"]
    return Defaults(guidance_scale=scale, num_inference_steps=12)


def count_callbacks(pipe: Pipeline, num_images: int, **options: Any) -> int:
    """How often a call with these options calls its `progress`: the length of a progress bar."""
    given = {name: value for name, value in options.items() if name in SHARED and value is not None}
    devices, at_once = given.get("devices"), pipe.images_per_device
    devices = jax.local_devices() if devices is None and pipe.mesh is None else devices
    mesh = computing_mesh(pipe.denoiser.params, num_images, at_once, devices)
    rows = int(cast(Any, steps(pipe, read_call(pipe, given), pipe.default_size).num_steps))
    return rows * -(-num_images // (at_once * num_batches_at_once(mesh)))


def latent_spec(pipe: Pipeline) -> LatentSpec:
    """A token for each pixel."""
    return LatentSpec(cast(Size, height_width(pipe.transformer.config.sample_size)), 1, 1, 1)


def check(pipe: Pipeline) -> None:
    """Raise `CheckpointError` where the parts are of different models."""
    config = pipe.transformer.config
    if not hasattr(config, "codebook_size") or not hasattr(config, "mask_token"):
        raise CheckpointError("its transformer is not one of masked tokens: a MaskGITTransformer is needed")
    check_mask_token(pipe)
    if mask_token(pipe) != config.mask_token:
        raise CheckpointError(
            f"its scheduler's mask is token {mask_token(pipe)}, its transformer's {config.mask_token}"
        )
    names = len(pipe.class_names)
    if names and names != (pipe.num_classes or 0):
        raise CheckpointError(
            f"its id2label does not name each of its network's {pipe.num_classes or 0} classes"
        )


def write_options(pipe: Pipeline) -> dict[str, Any]:
    """Names of the classes, and options that are not the usual ones."""
    return class_to_image.options_to_write(pipe, OPTIONS)


def read_options(index: Mapping[str, Any], folder: Folder) -> dict[str, Any]:
    """The inverse of `write_options`."""
    read = class_to_image.read_options(index, folder)
    return {name: value for name, value in read.items() if name in OPTIONS}


MASKGIT = Family(
    name="MaskGIT",
    folder=Folder(
        class_names=(MASKGIT_CLASS,),
        parts=("transformer", "scheduler"),
        options=OPTIONS,
        check=check,
        read_options=read_options,
        write_options=write_options,
    ),
    defaults=defaults,
    encode=encode,
    autoencoder=None,
    latent_spec=latent_spec,
    grid=steps,
    is_guidance_distilled=lambda pipe: False,
    check_guidance=class_to_image.check_guidance,
    read_prompts=class_to_image.read_labels,
    read_inputs=read_tokens,
    initial_latents=initial_tokens,
    denoise=unmask_tokens,
    decode=decode,
    call=class_to_image.draw_classes,
    num_callbacks=count_callbacks,
    unused=(
        *("num_images_per_prompt", "true_cfg_scale", "height", "width", "image", "strength", "mask_image"),
        *("solver", "eta", "variance", "spacing", "sigmas", "timesteps", "tiling", "previews", "cache"),
        "token_merging",
        *("guidance_rescale", "denoising_start", "denoising_end", "resize", "on_x0", "weak_guidance"),
    ),
    methods={
        "mask_token": mask_token,
        "image_tokens": image_tokens,
        "cycle_labels": cycle_labels,
        "check_guidance_scale": class_to_image.check_guidance_scale,
        "image_shape": class_to_image.image_shape,
    },
)
