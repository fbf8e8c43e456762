"""DeepFloyd IF, the open Imagen: 64x64 pixels from a text, and 256x256 of those. Saharia et al. 2022.

    stage_1 = pipelines.load("IF-I-XL-v1.0", dtype="bfloat16")
    stage_2 = pipelines.load("IF-II-L-v1.0", dtype="bfloat16")
    small = stage_1(key, "a kangaroo in an orange hoodie", spacing="smart100")
    large = stage_2(key, "a kangaroo in an orange hoodie", image=small, spacing="smart50")

U-Nets on pixels that look at the states of T5, and have a learned variance. `spacing` may be a name in
`RESPACINGS` too, which has its own number of steps. The scheduler of the published folders is DDPM with the
learned variance, on x_0 under dynamic thresholding; with other solvers the variance is not used. All stages
have the same text encoder: a folder may lack it, and `stage_2.replace(text_encoder=stage_1.text_encoder,
tokenizer=stage_1.tokenizer)` shares one.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, cast

import jax
import numpy as np
from jaxtyping import Array, Float, Key, Real

from jaxldm import arguments, models, schedulers
from jaxldm import diffusion as D
from jaxldm.errors import CheckpointError, InvalidArgumentError, one_of
from jaxldm.pipelines.call import EMBEDS, Call, Defaults, ImageKeys, Request
from jaxldm.pipelines.embeds import NoText, TextWidths
from jaxldm.pipelines.families.stable_diffusion import WITHOUT_SAFETY_CHECKER
from jaxldm.pipelines.family import Family, Folder, check_text_width, default_latent_spec
from jaxldm.pipelines.generate import generate, grid, num_callbacks
from jaxldm.pipelines.inputs import LatentSpec, Size, check_rows, repeated, rgb_pixels
from jaxldm.pipelines.pipeline import Pipeline
from jaxldm.pipelines.prompts import as_texts, encode_texts, for_each

MAX_LENGTH = 77  # tokens of a text that the published models were trained on
# The grids of the published models: how many steps each of equal parts of the timesteps gets, cleanest first.
RESPACINGS: dict[str, tuple[int, ...]] = {
    "fast27": (10, 10, 3, 2, 2),
    "smart27": (7, 4, 2, 1, 2, 4, 7),
    "smart50": (10, 6, 4, 3, 2, 2, 3, 4, 6, 10),
    "smart100": (*(1,) * 4, *(2,) * 6, *(3, 3, 4, 4, 5, 5, 6, 7, 7, 8, 9, 10, 13)),
    "smart185": (1, 1, 2, 2, 2, 3, 3, 3, *range(4, 17), 18, 20),
    "super27": (*(1,) * 7, 2, 5, 13),
    "super40": (*(2,) * 6, 3, 4, 6, 15),
    "super100": (4, 4, 6, 6, 8, 8, 10, 10, 14, 30),
}
_NOISING = np.uint32(2**32 - 2)  # what an image's key is folded with; no step has this number


def respaced_timesteps(counts: Sequence[int], num_train_timesteps: int = 1000) -> list[int]:
    """Timesteps, noisiest first: the path cut into equal parts, `counts` of them from each, ends included.

    Nichol & Dhariwal 2021, section 4, as published for each part of the path. Parts that cannot be equal are
    longer by one where the image is cleanest.

    >>> respaced_timesteps((2, 3), 10)
    [9, 7, 5, 4, 0]
    """
    timesteps: list[int] = []
    for part, count in zip(np.array_split(np.arange(num_train_timesteps), len(counts)), counts, strict=True):
        step = (len(part) - 1) / (count - 1) if count > 1 else 1.0
        # Sums and not products: their rounding decides between two timesteps, as it did for the models.
        places = itertools.accumulate([0.0] + [step] * (count - 1))
        timesteps += [int(part[0]) + round(place) for place in places]
    return timesteps[::-1]


def encode(pipe: Pipeline, request: Request) -> tuple[dict[str, Any], dict[str, Any]]:
    """T5's states of 77 tokens; where there is no negative prompt, those of the empty text.

    The models were trained on texts in small letters, so they are made small. URLs, HTML and the like, which
    diffusers takes out where two more packages are installed, stay.

    Raises:
        InvalidArgumentError: there is no text encoder.
    """
    lacks_encoder = pipe.text_encoder is None or pipe.tokenizer is None

    def states(texts: list[str]) -> dict[str, Any]:
        if lacks_encoder and all(isinstance(text, NoText) for text in texts):
            shape = (len(texts), MAX_LENGTH, pipe.unet.config.text_dim)
            return {"encoder_hidden_states": np.zeros(shape, np.float32)}
        if lacks_encoder:
            raise InvalidArgumentError(
                "this model was loaded without a text encoder: give it the other stage's, with "
                "stage_2.replace(text_encoder=stage_1.text_encoder, tokenizer=stage_1.tokenizer), or "
                'prompt_embeds=cond["encoder_hidden_states"] (uncond: negative_prompt_embeds) of '
                "cond, uncond = stage_1.encode_prompts(...)"
            )
        texts = [text.lower().strip() for text in texts]
        options = {"max_length": MAX_LENGTH, "mask": True}
        encoded = encode_texts(pipe.text_encoder, pipe.tokenizer, texts, **options)
        return {"encoder_hidden_states": encoded.hidden}

    return request.both(states)


def encode_with_image(
    pipe: Pipeline, request: Request, *, small_image: Any, noise_level: int = 250
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What stage I takes, the small images enlarged and noised, and their noise level.

    Saharia et al. 2022, section 2.3, "noise conditioning augmentation". The noise of image k depends on its
    key alone, and is the same in both branches.

    Raises:
        InvalidArgumentError: a noise level that is no timestep.
    """
    path = schedulers.from_config(pipe.image_noising_scheduler, "ddim").path
    last = cast(int, path.num_train_timesteps) - 1
    arguments.count(0, last)("noise_level", noise_level)
    cond, uncond = encode(pipe, request)
    count = len(request.prompts)
    enlarged = repeated(np.asarray(models.resize_linear(small_image, request.size)), count)
    level = np.full(count, noise_level, np.float32)
    pictures = noised_pictures(pipe.image_noising_scheduler, cast(ImageKeys, request.keys), enlarged, level)
    noised = {"extra_channels": pictures, "class_labels": level}
    return cond | noised, uncond | noised


def noised_pictures(
    scheduler: Any, keys: ImageKeys, pictures: Float[np.ndarray, "N H W C"], level: Real[np.ndarray, " N"]
) -> Float[np.ndarray, "N H W C"]:
    """Pictures at a timestep of a scheduler's path; the noise of image k depends on its key alone."""
    path = schedulers.from_config(scheduler, "ddim").path
    folded = jax.vmap(jax.random.fold_in, (0, None))(keys.wrapped(), _NOISING)
    noise = np.asarray(D.solvers.noise_like(folded, cast(Any, pictures)))
    t = np.asarray(level, np.float32)[:, None, None, None]
    return np.asarray(path.alpha(t) * pictures + path.sigma(t) * noise)


def enlarge(
    pipe: Pipeline,
    key: Key[Array, " ..."],
    prompt: str | Sequence[str] | None = None,
    negative_prompt: str | Sequence[str] | None = None,
    *,
    image: Any = None,
    original_image: Any = None,
    noise_level: int = 250,
    num_images_per_prompt: int = 1,
    **options: Any,
) -> Any:
    """Draw images, float32 [N, H, W, 3] in [-1, 1], from texts and small images.

    Args:
        key, prompt, negative_prompt, num_images_per_prompt: as in `generate`.
        image: the small image: 8-bit pixels or floats in [-1, 1], [h, w, 3] or [n, h, w, 3], PIL images. One
            for all, one for each prompt or one for each image; it is enlarged to the size to draw.
        original_image: a large image to start from, as `image` in `generate`: with `strength` and
            `mask_image`.
        noise_level: a timestep: up to which the enlarged image is noised, which hides what the first stage
            got wrong.
        options: of `generate`.

    Raises:
        UnknownNameError, InvalidArgumentError, DataError: always before the network is compiled.
    """
    states = options.get("prompt_embeds")
    prompts = as_texts(prompt) if states is None else [NoText()] * len(states)
    negatives = for_each(negative_prompt, prompts, "negative_prompt")
    if negatives is not None:
        negatives = [text for text in negatives for _ in range(num_images_per_prompt)]
    for name in EMBEDS:
        if options.get(name) is not None and len(options[name]) == len(prompts):
            options[name] = np.repeat(np.asarray(options[name]), num_images_per_prompt, axis=0)
    each = [text for text in prompts for _ in range(num_images_per_prompt)]
    if image is None:
        raise InvalidArgumentError("super-resolution needs image=, the small image that stage I drew")
    if "small_image" in options:
        raise InvalidArgumentError("small_image is what becomes of image: write image=")
    small = rgb_pixels(image)
    if len(small) == len(prompts):
        small = np.repeat(small, num_images_per_prompt, axis=0)
    check_rows(small, len(each), "image")
    own = {"small_image": small, "noise_level": noise_level}
    texts = each if states is None else prompt
    return generate(pipe, key, texts, negatives, image=original_image, **own, **options)


def respaced_grid(pipe: Pipeline, call: Call, size: Size) -> tuple[Any, D.Grid]:
    """As for other families; `spacing` may be a name in `RESPACINGS` too.

    Raises:
        InvalidArgumentError: a name in `RESPACINGS` with sigmas, or another number of steps.
    """
    if call.spacing not in (None, *D.SPACINGS) and ":" not in call.spacing:  # package.module:function
        one_of("spacing", call.spacing, (*D.spacing_names(), *RESPACINGS))
    if call.spacing not in RESPACINGS:
        return grid(pipe, call, size)
    counts = RESPACINGS[call.spacing]
    if call.sigmas is not None or call.num_inference_steps not in (None, sum(counts)):
        raise InvalidArgumentError(
            f"spacing={call.spacing!r} cannot be combined with sigmas or another number of steps: leave out "
            f"sigmas, and num_inference_steps too, or give its {sum(counts)}"
        )
    timesteps = tuple(respaced_timesteps(counts, cast(int, pipe.prediction.path.num_train_timesteps)))
    changes = {"spacing": None, "num_inference_steps": None, "timesteps": timesteps}
    return grid(pipe, dataclasses.replace(call, **changes), size)


def count_enlarging(pipe: Pipeline, num_images: int, **options: Any) -> int:
    """As for other families: the image to start from is `original_image` here."""
    return num_callbacks(pipe, num_images, **options | {"image": options.get("original_image")})


def latent_spec(pipe: Pipeline) -> LatentSpec:
    """Pixels, of a size that the U-Net halves and doubles exactly."""
    return default_latent_spec(pipe, patch=pipe.unet.config.size_multiple)


def enlarged_latents(pipe: Pipeline) -> LatentSpec:
    """The same; half of the network's input is the small image."""
    config = pipe.unet.config
    return default_latent_spec(pipe, patch=config.size_multiple, in_channels=config.in_channels // 2)


def check(pipe: Pipeline, in_channels: int = 3) -> None:
    """The U-Net must be of this stage, and take what the text encoder and the scheduler give and want.

    Raises:
        CheckpointError: parts of different models.
    """
    config = pipe.unet.config
    if config.in_channels != in_channels or config.out_channels not in (3, 6):
        raise CheckpointError(
            f"its U-Net takes {config.in_channels} channels and draws {config.out_channels}: stage I "
            "takes 3, super-resolution 6, and both draw 6, the pixels and their variance"
        )
    if schedulers.from_config(pipe.scheduler).sampler.learned_variance and config.out_channels == 3:
        raise CheckpointError("its scheduler wants a learned variance, which its U-Net does not have")
    if pipe.text_encoder is not None:
        check_text_width(pipe, pipe.text_encoder.config.d_model, config.text_dim)


def check_enlarging(pipe: Pipeline) -> None:
    """As stage I, and the U-Net must take a noise level.

    Raises:
        CheckpointError: parts of different models.
    """
    check(pipe, in_channels=6)
    if not pipe.unet.config.has_classes:
        raise CheckpointError("its U-Net takes no noise level (class_embed_type of its config)")


DEEPFLOYD_IF = Family(
    name="DeepFloydIF",
    folder=Folder(
        class_names=("IFPipeline", "IFImg2ImgPipeline", "IFInpaintingPipeline"),
        parts=("unet", "scheduler"),
        optional=("text_encoder", "tokenizer"),
        constants=WITHOUT_SAFETY_CHECKER,
        check=check,
    ),
    defaults=lambda pipe: Defaults(guidance_scale=7.0, num_inference_steps=100, strength=0.7),
    encode=encode,
    denoisers=("unet",),
    autoencoder=None,
    latent_spec=latent_spec,
    grid=respaced_grid,
    text_widths=lambda pipe: TextWidths(pipe.unet.config.text_dim),
    unused=("tiling",),
)
DEEPFLOYD_IF_SUPER_RESOLUTION = DEEPFLOYD_IF._replace(
    name="DeepFloydIFSuperResolution",
    folder=DEEPFLOYD_IF.folder._replace(
        class_names=(
            "IFSuperResolutionPipeline",
            "IFImg2ImgSuperResolutionPipeline",
            "IFInpaintingSuperResolutionPipeline",
        ),
        parts=("unet", "scheduler", "image_noising_scheduler"),
        check=check_enlarging,
    ),
    defaults=lambda pipe: Defaults(guidance_scale=4.0, num_inference_steps=50),
    encode=encode_with_image,
    latent_spec=enlarged_latents,
    call=enlarge,
    num_callbacks=count_enlarging,
)
