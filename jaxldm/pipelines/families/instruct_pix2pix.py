"""InstructPix2Pix: a picture and what to change in it (Brooks et al. 2023, arXiv:2211.09800).

    pipe = pipelines.load("instruct-pix2pix")
    images = pipe(key, "make it snow", image=picture, guidance_scale=7.5, image_guidance_scale=1.5)

The U-Net of Stable Diffusion, or of SDXL, with the latents of the picture behind x: 8 channels. Guidance has
three branches, without anything, with the picture alone, and with both; section 3.2.1, equation 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from jaxldm import diffusion as D
from jaxldm.errors import CheckpointError
from jaxldm.pipelines.call import Call, Defaults, Request
from jaxldm.pipelines.families import stable_diffusion, stable_diffusion_xl
from jaxldm.pipelines.families.stable_diffusion import STABLE_DIFFUSION
from jaxldm.pipelines.families.stable_diffusion_xl import STABLE_DIFFUSION_XL
from jaxldm.pipelines.family import default_latent_spec, first_class_name
from jaxldm.pipelines.inputs import OF_A_START, InitialLatents, Inputs, LatentSpec, Size, taken_latents
from jaxldm.pipelines.pipeline import Pipeline
from jaxldm.pipelines.sampling_run import PerCall

_SCALE = "_image_guidance_scale"


def encode(
    pipe: Pipeline,
    request: Request,
    *,
    image_guidance_scale: float = 1.5,
    clip_skip: int = 0,
    prompt_syntax: str = "plain",
) -> tuple[dict[str, Any], dict[str, Any]]:
    """As in Stable Diffusion.

    Args:
        image_guidance_scale: how closely the picture is kept, 1 or more; it is used where guidance_scale is
            not 1.
        clip_skip, prompt_syntax: as in Stable Diffusion.
    """
    options = {"clip_skip": clip_skip, "prompt_syntax": prompt_syntax}
    return _with_scale(*stable_diffusion.encode(pipe, request, **options), image_guidance_scale)


def encode_xl(
    pipe: Pipeline,
    request: Request,
    *,
    image_guidance_scale: float = 1.5,
    prompt_2: str | list[str] | None = None,
    negative_prompt_2: str | list[str] | None = None,
    original_size: Size | None = None,
    crops_coords_top_left: Size = (0, 0),
    target_size: Size | None = None,
    clip_skip: int = 0,
    prompt_syntax: str = "plain",
) -> tuple[dict[str, Any], dict[str, Any]]:
    """As in SDXL; the sizes are the same in all branches.

    Args:
        image_guidance_scale: how closely the picture is kept, 1 or more; it is used where guidance_scale is
            not 1.
        prompt_2, negative_prompt_2, original_size, crops_coords_top_left, target_size, clip_skip,
            prompt_syntax: as in SDXL.
    """
    branches = stable_diffusion_xl.encode(
        pipe,
        request,
        prompt_2=prompt_2,
        negative_prompt_2=negative_prompt_2,
        original_size=original_size,
        crops_coords_top_left=crops_coords_top_left,
        target_size=target_size,
        clip_skip=clip_skip,
        prompt_syntax=prompt_syntax,
    )
    return _with_scale(*branches, image_guidance_scale)


def _with_scale(cond: dict[str, Any], uncond: dict[str, Any], scale: float) -> tuple[dict, dict]:
    """Both with the scale as data of each image: another one compiles nothing."""
    scales = {_SCALE: np.full(len(cond["encoder_hidden_states"]), scale, np.float32)}
    return cond | scales, uncond | scales


def guidance(
    uncond: Float[Array, "N h w c"],
    cond: Float[Array, "N h w c"],
    t: Float[Array, " ..."],
    condition: Mapping[str, Any],
    per_call: PerCall,
) -> Float[Array, "N h w c"]:
    """Towards the picture with its scale, then from there towards the text; rescaled as elsewhere."""
    scales = condition[_SCALE], per_call.guidance_scale
    mixed = D.guide_chain((uncond, condition["_between"], cond), scales)
    return D.rescale_guidance(mixed, cond, per_call.guidance_rescale)


def latents_of_picture(pipe: Pipeline, call: Call, inputs: Inputs, num_images: int) -> InitialLatents:
    """The mean of the picture's latents behind x, and zeros in the branch without a picture.

    They are not scaled as x is, for so the networks were trained; but those of CosXL are.
    """
    picture = taken_latents(pipe.autoencoder, inputs, num_images)
    if not pipe.options.get("is_cosxl_edit"):
        picture = picture / np.float32(pipe.vae.config.scaling_factor)
    return InitialLatents(inputs.latents, extra_channels=picture, uncond_channels=np.zeros_like(picture))


def latent_spec(pipe: Pipeline) -> LatentSpec:
    """Those of Stable Diffusion; the other half of the input channels is the picture."""
    spec = default_latent_spec(pipe, in_channels=pipe.vae.config.latent_channels)
    return spec._replace(image_factor=1)


def check(pipe: Pipeline) -> None:
    """As Stable Diffusion, with twice the input channels.

    Raises:
        CheckpointError: parts of different models.
    """
    taken, channels = pipe.unet.config.in_channels, pipe.vae.config.latent_channels
    if taken != 2 * channels:
        raise CheckpointError(
            f"its U-Net has {taken} input channels, not the {2 * channels} of latents and a picture: it is "
            "no InstructPix2Pix model"
        )
    stable_diffusion.check(pipe)


_CHANGES = {
    "combine": guidance,
    "latent_spec": latent_spec,
    "initial_latents": latents_of_picture,
    "unused": OF_A_START,
}
INSTRUCT_PIX2PIX = STABLE_DIFFUSION._replace(
    name="InstructPix2Pix",
    folder=STABLE_DIFFUSION.folder._replace(
        class_names=("StableDiffusionInstructPix2PixPipeline",), check=check, class_name=first_class_name
    ),
    encode=encode,
    defaults=lambda pipe: Defaults(guidance_scale=7.5, num_inference_steps=100),
    **_CHANGES,
)
INSTRUCT_PIX2PIX_XL = STABLE_DIFFUSION_XL._replace(
    name="InstructPix2PixXL",
    folder=STABLE_DIFFUSION_XL.folder._replace(
        class_names=("StableDiffusionXLInstructPix2PixPipeline",),
        options=dict(STABLE_DIFFUSION_XL.folder.options) | {"is_cosxl_edit": False},
        check=check,
        class_name=first_class_name,
    ),
    encode=encode_xl,
    defaults=lambda pipe: Defaults(guidance_scale=5.0, num_inference_steps=100),
    **_CHANGES,
)
