"""The first published latent diffusion models: text-to-image, and super-resolution without a text.

    pipe = pipelines.load("ldm-text2im-large-256")
    images = pipe(key, "a squirrel eats a burger", guidance_scale=6.0, eta=0.3)
    large = pipelines.load("ldm-super-resolution-4x-openimages")(key, image=small)

Rombach et al. 2022, sections 4.3.1 and 4.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from jaxtyping import Array, Float, Key

from jaxldm.errors import CheckpointError, InvalidArgumentError
from jaxldm.pipelines.call import Call, Defaults, Request
from jaxldm.pipelines.embeds import TextWidths
from jaxldm.pipelines.family import (
    Family,
    Folder,
    check_latent_channels,
    check_text_width,
    states_width,
)
from jaxldm.pipelines.generate import generate
from jaxldm.pipelines.handed_in import latent_channels
from jaxldm.pipelines.inputs import OF_A_START, InitialLatents, Inputs, LatentSpec, repeated, rgb_pixels
from jaxldm.pipelines.latents import decode_images, scale_factor
from jaxldm.pipelines.pipeline import OF_TEXTS, Pipeline
from jaxldm.pipelines.prompts import encode_texts

TOKENS = 77


def encode(pipe: Pipeline, request: Request) -> tuple[dict[str, Any], dict[str, Any]]:
    """The states of 77 tokens, padding included; without a negative prompt those of the empty text."""

    def states(texts: Sequence[str]) -> dict[str, Any]:
        return {
            "encoder_hidden_states": encode_texts(pipe.bert, pipe.tokenizer, texts, max_length=TOKENS).hidden
        }

    return request.both(states)


def check_text_to_image(pipe: Pipeline) -> None:
    """The states and the latents must be as wide as the U-Net takes them.

    Raises:
        CheckpointError: parts of different models.
    """
    check_text_width(pipe, states_width(pipe.bert), pipe.unet.config.text_dim)
    check_latent_channels(pipe, pipe.unet.config.in_channels)


LDM_TEXT_TO_IMAGE = Family(
    name="LDMTextToImage",
    folder=Folder(
        class_names=("LDMTextToImagePipeline",),
        parts=("unet", "vqvae", "bert", "tokenizer", "scheduler"),
        check=check_text_to_image,
    ),
    denoisers=("unet",),
    autoencoder="vqvae",
    encode=encode,
    defaults=lambda pipe: Defaults(guidance_scale=1.0),
    text_widths=lambda pipe: TextWidths(pipe.unet.config.text_dim),
)


# ---------------------------------------------------------------- super-resolution


def enlarge(
    pipe: Pipeline,
    key: Key[Array, " ..."],
    *,
    image: Any = None,
    num_images: int | None = None,
    **options: Any,
) -> Any:
    """Draw images, float32 [N, H, W, 3] in [-1, 1], of small pictures.

    Args:
        key: as in `generate`.
        image: the pictures: 8-bit pixels or floats in [-1, 1], [h, w, 3] or [n, h, w, 3], PIL images.
        num_images: N; default one for each picture.
        options: of `generate`.

    Raises:
        UnknownNameError, InvalidArgumentError, DataError: always before the network is compiled.
    """
    for name in OF_TEXTS:
        if options.pop(name, None) is not None:
            raise InvalidArgumentError(f"{name} is a text, and this model draws no texts: leave it out")
    if image is None:
        raise InvalidArgumentError("super-resolution needs image=, the small picture (--image FILE)")
    count = len(rgb_pixels(image)) if num_images is None else num_images
    return generate(pipe, key, [""] * count, image=image, **options)


def no_text(pipe: Pipeline, request: Request) -> tuple[dict[str, Any], dict[str, Any]]:
    """Nothing: the network takes no text."""
    return {}, {}


def picture_behind(pipe: Pipeline, call: Call, inputs: Inputs, num_images: int) -> InitialLatents:
    """The pixels of the picture behind x."""
    if inputs.image_is_latents:
        raise InvalidArgumentError("super-resolution takes pixels, no latents: give image as pixels")
    picture = repeated(cast(np.ndarray, inputs.image), num_images)
    return InitialLatents(inputs.latents, extra_channels=picture)


def enlarged_latents(pipe: Pipeline) -> LatentSpec:
    """A latent for each pixel of the picture, which the U-Net halves and doubles exactly."""
    factor, config = scale_factor(pipe.vqvae), pipe.unet.config
    multiple = factor * 2 ** (len(config.block_out_channels) - 1)
    side = config.sample_size if isinstance(config.sample_size, int) else 64
    size = (side * factor, side * factor)
    return LatentSpec(size, multiple, factor, latent_channels(pipe.vqvae.config), image_factor=factor)


def decode_unscaled(
    pipe: Pipeline, latents: Float[Any, "N h w c"], **options: Any
) -> Float[np.ndarray, "N H W C"]:
    """Images of latents that are as the autoencoder has them: so this model was trained."""
    scale = np.float32(pipe.vqvae.config.scaling_factor)
    return decode_images(pipe.vqvae, np.asarray(latents, np.float32) * scale, **options)


def check_super_resolution(pipe: Pipeline) -> None:
    """The U-Net takes latents and a picture, and draws latents.

    Raises:
        CheckpointError: parts of different models.
    """
    channels, config = latent_channels(pipe.vqvae.config), pipe.unet.config
    if (config.in_channels, config.out_channels) != (channels + 3, channels):
        raise CheckpointError(
            f"its U-Net takes {config.in_channels} channels and draws {config.out_channels}, not the "
            f"{channels + 3} of latents and a picture and {channels}: it is no model of super-resolution"
        )


LDM_SUPER_RESOLUTION = Family(
    name="LDMSuperResolution",
    folder=Folder(
        class_names=("LDMSuperResolutionPipeline",),
        parts=("unet", "vqvae", "scheduler"),
        check=check_super_resolution,
    ),
    denoisers=("unet",),
    autoencoder="vqvae",
    encode=no_text,
    defaults=lambda pipe: Defaults(guidance_scale=1.0, num_inference_steps=100),
    latent_spec=enlarged_latents,
    initial_latents=picture_behind,
    decode=decode_unscaled,
    call=enlarge,
    unused=(*OF_A_START, "guidance_scale", "guidance_rescale", "true_cfg_scale", "num_images_per_prompt"),
)
