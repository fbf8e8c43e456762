"""The x4 upscaler of Stable Diffusion 2: a picture, four times as high and wide, under a text.

    pipe = pipelines.load("stable-diffusion-x4-upscaler")
    large = pipe(key, "a white cat", image=small, noise_level=20)

The U-Net draws latents of the picture's size, which stands behind them as it is, in pixels and noised; the
level of its noise is a class label ("noise conditioning augmentation": Saharia et al. 2022, section 2.3; Ho
et al. 2021, arXiv:2106.15282).
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from jaxldm import arguments
from jaxldm.errors import CheckpointError, InvalidArgumentError
from jaxldm.pipelines.call import Call, Defaults, ImageKeys, Request
from jaxldm.pipelines.families import stable_diffusion
from jaxldm.pipelines.families.deepfloyd_if import noised_pictures
from jaxldm.pipelines.families.stable_diffusion import STABLE_DIFFUSION
from jaxldm.pipelines.family import default_latent_spec, first_class_name
from jaxldm.pipelines.generate import denoise_latents
from jaxldm.pipelines.inputs import OF_A_START, InitialLatents, Inputs, LatentSpec, repeated
from jaxldm.pipelines.pipeline import Pipeline


def encode(
    pipe: Pipeline,
    request: Request,
    *,
    noise_level: int = 20,
    clip_skip: int = 0,
    prompt_syntax: str = "plain",
) -> tuple[dict[str, Any], dict[str, Any]]:
    """As in Stable Diffusion, and the level of the noise in the picture.

    Args:
        noise_level: a timestep, up to which the picture is noised: more hides more of its flaws.
        clip_skip, prompt_syntax: as in Stable Diffusion.

    Raises:
        InvalidArgumentError: a level beyond those of the training.
    """
    last = min(pipe.max_noise_level, cast(int, pipe.unet.config.num_class_embeds) - 1)
    arguments.count(0, last)("noise_level", noise_level)
    options = {"clip_skip": clip_skip, "prompt_syntax": prompt_syntax}
    cond, uncond = stable_diffusion.encode(pipe, request, **options)
    level = {"class_labels": np.full(len(cond["encoder_hidden_states"]), noise_level, np.int32)}
    return cond | level, uncond | level


def picture_behind(pipe: Pipeline, call: Call, inputs: Inputs, num_images: int) -> InitialLatents:
    """The pixels of the picture.

    Raises:
        InvalidArgumentError: latents in their place.
    """
    if inputs.image_is_latents:
        raise InvalidArgumentError("this upscaler takes pixels, no latents: give image as pixels")
    picture = repeated(cast(np.ndarray, inputs.image), num_images)
    return InitialLatents(inputs.latents, extra_channels=picture)


def denoise(
    pipe: Pipeline,
    call: Call,
    run: Any,
    guidance_scale: float,
    keys: ImageKeys,
    condition: tuple[dict[str, Any], dict[str, Any] | None],
    start: InitialLatents,
    latent_shape: tuple[int, int, int],
) -> Any:
    """As elsewhere, from the picture with noise of each image's key."""
    level = condition[0]["class_labels"]
    noised = noised_pictures(pipe.low_res_scheduler, keys, cast(np.ndarray, start.extra_channels), level)
    start = start._replace(extra_channels=noised)
    return denoise_latents(pipe, call, run, guidance_scale, keys, condition, start, latent_shape)


def latent_spec(pipe: Pipeline) -> LatentSpec:
    """A latent for each pixel of the picture."""
    spec = default_latent_spec(pipe, in_channels=pipe.vae.config.latent_channels)
    return spec._replace(image_factor=spec.factor)


def check(pipe: Pipeline) -> None:
    """As Stable Diffusion, with three input channels more and a noise level.

    Raises:
        CheckpointError: parts of different models.
    """
    config, channels = pipe.unet.config, pipe.vae.config.latent_channels
    if config.in_channels != channels + 3 or config.num_class_embeds is None:
        raise CheckpointError(
            f"its U-Net has {config.in_channels} input channels and num_class_embeds "
            f"{config.num_class_embeds}, not the {channels + 3} of latents and a picture, and a table of "
            "noise levels: it is no upscaler"
        )
    stable_diffusion.check(pipe)


STABLE_DIFFUSION_UPSCALE = STABLE_DIFFUSION._replace(
    name="StableDiffusionUpscale",
    folder=STABLE_DIFFUSION.folder._replace(
        class_names=("StableDiffusionUpscalePipeline",),
        parts=(*STABLE_DIFFUSION.folder.parts, "low_res_scheduler"),
        options={"max_noise_level": 350},
        constants={},
        check=check,
        class_name=first_class_name,
    ),
    encode=encode,
    defaults=lambda pipe: Defaults(guidance_scale=9.0, num_inference_steps=75),
    latent_spec=latent_spec,
    initial_latents=picture_behind,
    denoise=denoise,
    unused=OF_A_START,
)
