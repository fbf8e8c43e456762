"""The x2 latent upscaler of Stable Diffusion: latents, twice as high and wide, under a text.

    upscaler = pipelines.load("sd-x2-latent-upscaler")
    small = pipe(key, "a white cat", output="latents")                  # of Stable Diffusion 1 or 2
    large = upscaler(key, "a white cat", image=pipelines.Latents(small), guidance_scale=1)

The U-Net, `models.KUNet2DConditionModel`, takes the small latents, doubled, behind x, and the pooled text
with the time. Its output is F of the preconditioning of Karras et al. 2022, table 1, sigma_data = 1.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxldm import diffusion as D
from jaxldm import models
from jaxldm.diffusion.values import equal_by_call
from jaxldm.errors import CheckpointError
from jaxldm.pipelines.call import Call, Defaults, Request
from jaxldm.pipelines.families.stable_diffusion import STABLE_DIFFUSION
from jaxldm.pipelines.family import check_text_width, default_latent_spec, first_class_name
from jaxldm.pipelines.generate import grid, read_scheduler
from jaxldm.pipelines.inputs import OF_A_START, InitialLatents, Inputs, LatentSpec, Size, taken_latents
from jaxldm.pipelines.pipeline import Pipeline
from jaxldm.pipelines.weighted_prompts import text_encoding

# The noise of the small latents as the U-Net takes it: cos 0 and sin 0, for none.
_NO_NOISE = np.repeat(np.array([1, 0], np.float32), 64)


def encode(
    pipe: Pipeline, request: Request, *, prompt_syntax: str = "plain"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The encoder's last states, without its last normalisation, and the pooled text.

    Args:
        prompt_syntax: as in Stable Diffusion.
    """
    texts = [*request.prompts, *(request.negatives or [""])]
    encoding = text_encoding(prompt_syntax, [(pipe.text_encoder, pipe.tokenizer, texts)])

    def states(texts: list[str]) -> dict[str, Any]:
        encoded = encoding(pipe.text_encoder, pipe.tokenizer, texts, final_norm=False)
        return {"encoder_hidden_states": encoded.hidden, "timestep_cond": _with_noise(encoded.pooled)}

    return request.both(states)


def _with_noise(pooled: Any) -> np.ndarray:
    """The pooled texts [P, D] behind the noise level of the picture."""
    pooled = np.asarray(pooled, np.float32)
    return np.concatenate([np.broadcast_to(_NO_NOISE, (len(pooled), 128)), pooled], axis=-1)


@equal_by_call
def preconditioned(path: D.Path) -> D.Prediction:
    """x_0 = c_skip x + c_out F(c_in x, ln(sigma) / 4), of x = x_t / alpha and sigma = sigma_t / alpha.

    With c_skip = 1 / (sigma^2 + 1) and c_out = sigma / sqrt(sigma^2 + 1) that is alpha x_t + sigma_t F on the
    variance-preserving path, the x_0 of v = -F; and c_in x is x_t itself.
    """
    v = D.v(path)

    def precondition(x_t: Any, t: Any) -> tuple[Any, Any]:
        return x_t, jnp.log(path.sigma(t) / path.alpha(t)) / 4

    return v._replace(
        precondition=precondition,
        to_x0=lambda output, x_t, t: v.to_x0(-output, x_t, t),
        target=lambda x_0, epsilon, t: -v.target(x_0, epsilon, t),
    )


def upscaling_grid(pipe: Pipeline, call: Call, size: Size) -> Any:
    """As elsewhere; the scheduler's file says "sample", which the output is behind the preconditioning."""
    scheduler = read_scheduler(pipe, call)
    prediction = preconditioned(scheduler.path)
    sampler = scheduler.sampler._replace(prediction=prediction)
    return grid(pipe, call, size, dataclasses.replace(scheduler, sampler=sampler))


def latents_behind(pipe: Pipeline, call: Call, inputs: Inputs, num_images: int) -> InitialLatents:
    """The mean of the picture's latents, every one four times."""
    small = taken_latents(pipe.autoencoder, inputs, num_images)
    return InitialLatents(inputs.latents, extra_channels=small.repeat(2, axis=1).repeat(2, axis=2))


def latent_spec(pipe: Pipeline) -> LatentSpec:
    """Twice the picture's size, of sides that the U-Net can halve."""
    channels = pipe.vae.config.latent_channels
    spec = default_latent_spec(pipe, in_channels=channels)
    multiple = int(spec.factor) * max(2, pipe.unet.config.size_multiple)
    return spec._replace(multiple=multiple, image_factor=2)


def check(pipe: Pipeline) -> None:
    """The U-Net must be of this kind, and take the text's states, the pooled text and two latents.

    Raises:
        CheckpointError: parts of different models.
    """
    config, channels = pipe.unet.config, pipe.vae.config.latent_channels
    if not isinstance(config, models.KUNet2DConditionConfig):
        raise CheckpointError("its U-Net has none of the K blocks of the latent upscaler")
    if (config.in_channels, config.out_channels) != (2 * channels, channels + 1):
        raise CheckpointError(
            f"its U-Net takes {config.in_channels} channels and draws {config.out_channels}, not the "
            f"{2 * channels} of two latents and {channels + 1}: it is no latent upscaler"
        )
    width = pipe.text_encoder.config.hidden_size
    check_text_width(pipe, width, config.cross_attention_dim)
    if config.time_cond_proj_dim != 128 + width:
        raise CheckpointError(
            f"its U-Net takes {config.time_cond_proj_dim} numbers with the time, not 128 and {width} of the "
            "pooled text"
        )


LATENT_UPSCALE = STABLE_DIFFUSION._replace(
    name="StableDiffusionLatentUpscale",
    folder=STABLE_DIFFUSION.folder._replace(
        class_names=("StableDiffusionLatentUpscalePipeline",),
        control=(),
        constants={},
        check=check,
        class_name=first_class_name,
    ),
    encode=encode,
    defaults=lambda pipe: Defaults(guidance_scale=9.0, num_inference_steps=75),
    text_widths=None,
    latent_spec=latent_spec,
    grid=upscaling_grid,
    is_guidance_distilled=lambda pipe: False,
    initial_latents=latents_behind,
    unused=OF_A_START,
)
