"""FLUX.1 models that take a picture: Fill, Control (Canny and Depth) and Kontext.

    pipelines.load("FLUX.1-Fill-dev")(key, "a red hat", image=photo, mask_image=mask)
    pipelines.load("FLUX.1-Depth-dev")(key, "a robot", image=depth)
    pipelines.load("FLUX.1-Kontext-dev")(key, "make it snow", image=photo)

Fill takes the latents of what stays, and the mask, as channels behind x; Control those of a map of depth or
of edges; Kontext those of the picture as tokens behind x's, with a first coordinate of 1 (Black Forest Labs
et al. 2025, arXiv:2506.15742, section 3).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxldm import models
from jaxldm.arguments import checked
from jaxldm.errors import CheckpointError, InvalidArgumentError
from jaxldm.pipelines.call import Call, Defaults
from jaxldm.pipelines.families.flux import FLUX, check, latent_spec
from jaxldm.pipelines.family import Family
from jaxldm.pipelines.generate import encode_inputs
from jaxldm.pipelines.inputs import OF_A_START, InitialLatents, Inputs, LatentSpec, repeated, taken_latents
from jaxldm.pipelines.latents import scale_factor
from jaxldm.pipelines.network import Network
from jaxldm.pipelines.pipeline import A_PIPELINE, Pipeline


def mask_channels(mask: Float[np.ndarray, "N H W 1"], factor: int) -> Float[np.ndarray, "N h w F"]:
    """The pixels of a mask that a latent covers, row by row, as its channels: factor^2 of them.

    >>> mask_channels(np.arange(8.0).reshape(1, 2, 4, 1), 2)[0, 0, 1].tolist()
    [2.0, 3.0, 6.0, 7.0]
    """
    count, height, width, _ = mask.shape
    blocks = mask.reshape(count, height // factor, factor, width // factor, factor)
    return blocks.transpose(0, 1, 3, 2, 4).reshape(count, height // factor, width // factor, factor**2)


def _fill_channels(pipe: Pipeline) -> int:
    """Of the latents of what stays, and of the mask."""
    return pipe.vae.config.latent_channels + int(scale_factor(pipe.vae)) ** 2


def fill_spec(pipe: Pipeline) -> LatentSpec:
    """As FLUX, for inpainting."""
    return latent_spec(pipe, _fill_channels(pipe))._replace(takes_mask=True)


def fill_start(pipe: Pipeline, call: Call, inputs: Inputs, num_images: int) -> InitialLatents:
    """As other networks for inpainting start, with the mask behind what stays, one channel for each pixel."""
    start = encode_inputs(pipe, call, inputs, num_images)
    kept = cast(np.ndarray, start.extra_channels)[..., 1:]
    mask = mask_channels(cast(np.ndarray, inputs.mask), int(pipe.latent_spec.factor))
    return start._replace(extra_channels=np.concatenate([kept, repeated(mask, num_images)], axis=-1))


def check_fill(pipe: Pipeline) -> None:
    """As FLUX, with the channels of a mask and of a picture.

    Raises:
        CheckpointError: parts of different models.
    """
    _check_channels(pipe, _fill_channels(pipe), "a mask and a picture", "Fill")


def control_spec(pipe: Pipeline) -> LatentSpec:
    """As FLUX; the other half of the input channels is the map."""
    return latent_spec(pipe, pipe.vae.config.latent_channels)._replace(image_factor=1)


def control_start(pipe: Pipeline, call: Call, inputs: Inputs, num_images: int) -> InitialLatents:
    """The latents of the map behind x."""
    extra = taken_latents(pipe.autoencoder, inputs, num_images)
    return InitialLatents(inputs.latents, extra_channels=extra)


def check_control(pipe: Pipeline) -> None:
    """As FLUX, with twice the input channels.

    Raises:
        CheckpointError: parts of different models.
    """
    _check_channels(pipe, pipe.vae.config.latent_channels, "a picture", "Control")


def _check_channels(pipe: Pipeline, besides: int, what: str, name: str) -> None:
    config, channels = pipe.transformer.config, pipe.vae.config.latent_channels
    drawn = (config.out_channels or config.in_channels) // 4
    if config.latent_channels != channels + besides or drawn != channels:
        raise CheckpointError(
            f"its transformer takes {config.latent_channels} channels and draws {drawn}, not the "
            f"{channels + besides} of latents and {what} and {channels}: it is no FLUX.1 {name} model"
        )
    check(pipe, besides)


def kontext_start(pipe: Pipeline, call: Call, inputs: Inputs, num_images: int) -> InitialLatents:
    """The latents of the picture, which may be of another size than x; or none."""
    if inputs.image is None:
        return InitialLatents(inputs.latents)
    return InitialLatents(inputs.latents, reference=taken_latents(pipe.autoencoder, inputs, num_images))


@checked(pipe=A_PIPELINE)
def as_flux_control(pipe: Pipeline) -> Pipeline:
    """FLUX.1-dev as a Control model that does not look at its picture yet: for the Control LoRAs.

        pipe = pipelines.as_flux_control(pipelines.load("FLUX.1-dev"))
        pipe = pipelines.with_lora(pipe, "flux1-depth-dev-lora.safetensors")

    Its transformer takes twice the channels, the new ones times zero; nothing else changes.

    Args:
        pipe: of FLUX.1; stays as it is.

    Raises:
        InvalidArgumentError: a model of another family, or one in fewer bits.
    """
    if pipe.family.name != FLUX.name:
        raise InvalidArgumentError(f"pipe must be a FLUX.1 model, got one of the family {pipe.family.name}")
    config, params = pipe.transformer.config, pipe.transformer.params
    kernel = params["x_embedder"]["kernel"]
    if not isinstance(kernel, (np.ndarray, jax.Array)):
        raise InvalidArgumentError("the weights are in fewer bits: make a Control model of whole ones first")
    wider = jnp.concatenate([jnp.asarray(kernel), jnp.zeros_like(kernel)])
    changed = dataclasses.replace(config, in_channels=2 * config.in_channels, out_channels=config.in_channels)
    params = params | {"x_embedder": params["x_embedder"] | {"kernel": wider}}
    transformer = Network(models.from_config(changed), params)
    return dataclasses.replace(
        pipe, family=FLUX_CONTROL, parts=dict(pipe.parts) | {"transformer": transformer}
    )


def _family(
    name: str, class_name: str, check_parts: Callable[[Pipeline], None], defaults: Defaults, **changes: Any
) -> Family:
    """FLUX with other input."""
    folder = FLUX.folder._replace(class_names=(class_name,), check=check_parts)
    return FLUX._replace(name=name, folder=folder, defaults=lambda pipe: defaults, **changes)


FLUX_FILL = _family(
    "FluxFill",
    "FluxFillPipeline",
    check_fill,
    Defaults(guidance_scale=30.0, num_inference_steps=50, strength=1.0, round_up=True),
    latent_spec=fill_spec,
    initial_latents=fill_start,
)
FLUX_CONTROL = _family(
    "FluxControl",
    "FluxControlPipeline",
    check_control,
    Defaults(guidance_scale=3.5, num_inference_steps=28),
    latent_spec=control_spec,
    initial_latents=control_start,
    unused=OF_A_START,
)
FLUX_KONTEXT = _family(
    "FluxKontext",
    "FluxKontextPipeline",
    check,
    Defaults(guidance_scale=3.5, num_inference_steps=28),
    latent_spec=lambda pipe: latent_spec(pipe)._replace(image_factor=0),
    initial_latents=kontext_start,
    unused=OF_A_START,
)
