"""Wuerstchen: a text to small image embeddings, those to latents, those to pixels (Pernias et al. 2024,
arXiv:2306.00637).

    prior, decoder = pipelines.load("wuerstchen-prior"), pipelines.load("wuerstchen")   # published as two
    pipe = pipelines.join_wuerstchen(prior, decoder)
    images = pipe(key, "a fox in the snow", width=1536, num_inference_steps=29, spacing="stage_c")
    pipelines.save(pipe, "wuerstchen-whole")                                            # as one folder

The prior (stage C) draws image embeddings [N, h, w, 16], one for each 42.67 pixels, where others draw images:
`output="latents"` is what its network draws, `output="images"` the embeddings as the decoder takes them. The
decoder (stages B and A) draws latents from these, and makes images of them. The whole is two calls of
`generate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import jax
import numpy as np
from jaxtyping import Array, Float, Key

from jaxldm import diffusion as D
from jaxldm.arguments import checked
from jaxldm.errors import CheckpointError, InvalidArgumentError, one_of
from jaxldm.exact import floor_product
from jaxldm.pipelines.call import Defaults, Request
from jaxldm.pipelines.embeds import TextWidths
from jaxldm.pipelines.family import Family, Folder, check_latent_channels, check_text_width
from jaxldm.pipelines.generate import generate
from jaxldm.pipelines.inputs import LatentSpec, Size, four_axes
from jaxldm.pipelines.pipeline import A_PIPELINE, Pipeline
from jaxldm.pipelines.prompts import as_texts, encode_texts

TRAINED_SIZE = (1024, 1024)  # the smallest images of the training
OUTPUTS = ("images", "latents", "image_embeddings")
_UNUSED = ("image", "strength", "mask_image", "resize", "tiling")
_OF_BOTH = ("batch_size", "devices", "in_flight", "on_step", "on_x0", "progress", "compile_only")


def encode(pipe: Pipeline, request: Request) -> tuple[dict[str, Any], dict[str, Any]]:
    """CLIP's last states, without its padding; where there is no negative prompt, those of the empty text."""

    def states(texts: Sequence[str]) -> dict[str, Any]:
        encoded = encode_texts(pipe.text_encoder, pipe.tokenizer, texts, mask=True)
        return {"encoder_hidden_states": encoded.hidden}

    return request.both(states)


# ---------------------------------------------------------------- the prior


def prior_latents(pipe: Pipeline) -> LatentSpec:
    """Any size, rounded up to whole embeddings."""
    return LatentSpec(TRAINED_SIZE, 1, pipe.resolution_multiple, pipe.prior.config.c_in)


def embeddings(
    pipe: Pipeline, latents: Float[Any, "N h w c"], **options: Any
) -> Float[np.ndarray, "N h w c"]:
    """Image embeddings as the decoder takes them: `latents * latent_mean - latent_std`.

    The names are as published, although the second is subtracted.
    """
    return np.asarray(latents, np.float32) * np.float32(pipe.latent_mean) - np.float32(pipe.latent_std)


def check_prior(pipe: Pipeline) -> None:
    """The texts' states must be as wide as the prior takes them."""
    check_text_width(pipe, pipe.text_encoder.config.hidden_size, pipe.prior.config.c_cond)


WUERSTCHEN_PRIOR = Family(
    name="WuerstchenPrior",
    folder=Folder(
        class_names=("WuerstchenPriorPipeline",),
        parts=("prior", "text_encoder", "tokenizer", "scheduler"),  # CLIP ViT-bigG/14's text tower
        options={"latent_mean": 42.0, "latent_std": 1.0, "resolution_multiple": 42.67},
        check=check_prior,
    ),
    defaults=lambda pipe: Defaults(guidance_scale=8.0, num_inference_steps=60),
    encode=encode,
    denoisers=("prior",),
    autoencoder=None,
    latent_spec=prior_latents,
    decode=embeddings,
    text_widths=lambda pipe: TextWidths(pipe.prior.config.c_cond),
    unused=_UNUSED,
    draws_images=False,
)


# ---------------------------------------------------------------- the decoder


def encode_with_embeddings(
    pipe: Pipeline, request: Request, *, image_embeddings: Float[np.ndarray, "N h w e"]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """CLIP's states and the embeddings; zeros in place of these in the other branch."""
    cond, uncond = encode(pipe, request)
    nothing = np.zeros_like(image_embeddings)
    return cond | {"image_embeddings": image_embeddings}, uncond | {"image_embeddings": nothing}


def decode_embeddings(
    pipe: Pipeline,
    key: Key[Array, " ..."],
    prompt: str | Sequence[str] | None = None,
    negative_prompt: str | Sequence[str] | None = None,
    *,
    image_embeddings: Any = None,
    num_images_per_prompt: int = 1,
    **options: Any,
) -> Any:
    """Draw images, float32 [N, H, W, 3] in [-1, 1], from image embeddings.

    Args:
        key, prompt, negative_prompt, num_images_per_prompt: as in `generate`.
        image_embeddings: [E, h, w, 16], as the prior draws them: one for all images, one for each prompt, or
            one for each image.
        options: of `generate`, without height and width, which the embeddings set.

    Raises:
        InvalidArgumentError: no embeddings, another number of them, or of a size that stage B cannot draw.
    """
    if image_embeddings is None:
        raise InvalidArgumentError(
            "the decoder draws from image embeddings: give image_embeddings=, as the prior draws them, "
            "or draw with both, pipelines.join_wuerstchen(prior, decoder)"
        )
    given = four_axes(image_embeddings, pipe.decoder.config.effnet_embd, "image_embeddings")
    for name in ("height", "width"):
        if options.get(name) is not None:
            raise InvalidArgumentError(f"the image embeddings set the {name}: leave it out")
    states = options.get("prompt_embeds")
    count = len(as_texts(prompt) if states is None else states)
    if len(given) not in (1, count, count * num_images_per_prompt):
        raise InvalidArgumentError(
            f"{len(given)} image_embeddings for {count} prompts of {num_images_per_prompt} images each: give "
            "one for all, one for each prompt, or one for each image"
        )
    height, width = size_of(pipe, given.shape[1:3])
    size = {"height": height, "width": width, "num_images_per_prompt": num_images_per_prompt}
    return generate(pipe, key, prompt, negative_prompt, image_embeddings=given, **options | size)


def size_of(pipe: Pipeline, embeddings: Size) -> Size:
    """(height, width) in pixels of the images that h x w embeddings stand for.

    Raises:
        InvalidArgumentError: so many embeddings stand for latents that stage B cannot halve often enough.
    """
    multiple, factor = pipe.decoder.config.shrinks, pipe.vqgan.config.shrinks

    def latents(side: int) -> int:
        return floor_product(side, pipe.latent_dim_scale)

    def nearest(side: int) -> int:
        near = range(1, side + 2 * multiple)
        fitting = (n for n in near if latents(n) and latents(n) % multiple == 0)
        return latents(min(fitting, key=lambda n: abs(n - side))) * factor

    if any(latents(side) < 1 or latents(side) % multiple for side in embeddings):
        wanted, possible = ("x".join(map(str, map(f, embeddings))) for f in (latents, nearest))
        raise InvalidArgumentError(
            f"{embeddings[0]}x{embeddings[1]} image embeddings stand for {wanted} latents, and this "
            f"decoder takes multiples of {multiple}: draw with another height and width, such as "
            f"{possible}"
        )
    return tuple(latents(side) * factor for side in embeddings)


def decoder_latents(pipe: Pipeline) -> LatentSpec:
    """What stages A and B can draw."""
    factor, config = pipe.vqgan.config.shrinks, pipe.decoder.config
    return LatentSpec(TRAINED_SIZE, factor * config.shrinks, factor, config.c_in)


def check_decoder(pipe: Pipeline) -> None:
    """The texts' states and the latents must be as wide as the decoder takes them."""
    check_text_width(pipe, pipe.text_encoder.config.hidden_size, pipe.decoder.config.clip_embd)
    check_latent_channels(pipe, pipe.decoder.config.c_in)


WUERSTCHEN_DECODER = Family(
    name="WuerstchenDecoder",
    folder=Folder(
        class_names=("WuerstchenDecoderPipeline",),
        # The autoencoder's codebook is not used; CLIP ViT-H/14's text tower.
        parts=("decoder", "vqgan", "text_encoder", "tokenizer", "scheduler"),
        options={"latent_dim_scale": 10.67},  # latents to one image embedding, along each side
        check=check_decoder,
    ),
    defaults=lambda pipe: Defaults(guidance_scale=1.0, num_inference_steps=12),
    encode=encode_with_embeddings,
    denoisers=("decoder",),
    autoencoder="vqgan",
    latent_spec=decoder_latents,
    call=decode_embeddings,
    text_widths=lambda pipe: TextWidths(pipe.decoder.config.clip_embd),
    unused=_UNUSED,
    draws_images=False,
)


# ---------------------------------------------------------------- all stages in one


@checked(prior=A_PIPELINE, decoder=A_PIPELINE)
def join_wuerstchen(prior: Pipeline, decoder: Pipeline) -> Pipeline:
    """The two published folders as one model.

    Raises:
        InvalidArgumentError: scales other than the published ones, which a folder of this kind cannot hold.
        CheckpointError: the prior draws embeddings that the decoder does not take.
    """
    for name, stage, family in (("prior", prior, WUERSTCHEN_PRIOR), ("decoder", decoder, WUERSTCHEN_DECODER)):
        if stage.family.name != family.name:
            raise InvalidArgumentError(
                f"{name} must be a {family.folder.class_names[0]}, got a pipeline of {stage.family.name}"
            )
        for name, usual in stage.family.folder.options.items():
            if stage.options[name] != usual:
                raise InvalidArgumentError(
                    f"{name} is {stage.options[name]}; in one folder with the other stages it can be "
                    f"{usual} alone: call one stage after the other instead"
                )
    of_prior = {f"prior_{name}": part for name, part in prior.parts.items()}
    pipe = Pipeline(WUERSTCHEN, of_prior | dict(decoder.parts))
    pipe.check_parts()
    return pipe


def prior_stage(pipe: Pipeline) -> Pipeline:
    """Stage C alone."""
    names = WUERSTCHEN_PRIOR.folder.parts
    return Pipeline(WUERSTCHEN_PRIOR, {name: pipe.parts[f"prior_{name}"] for name in names})


def decoder_stage(pipe: Pipeline) -> Pipeline:
    """Stages B and A alone."""
    return Pipeline(WUERSTCHEN_DECODER, {name: pipe.parts[name] for name in WUERSTCHEN_DECODER.folder.parts})


def draw_both(
    pipe: Pipeline,
    key: Key[Array, " ..."],
    prompt: str | Sequence[str],
    negative_prompt: str | Sequence[str] | None = None,
    *,
    height: int | None = None,
    width: int | None = None,
    guidance_scale: float | None = None,
    num_images_per_prompt: int = 1,
    output: str = "images",
    **options: Any,
) -> Any:
    """Draw images, float32 [N, H, W, 3] in [-1, 1]: those of the first prompt, of the second, ...

    Args:
        key, prompt, negative_prompt, num_images_per_prompt: as in `generate`; both stages take the same.
        height, width: in pixels, divisible by 128; default 1024.
        guidance_scale: of the prior, default 4.
        output: "images", "latents" of stage A, or the "image_embeddings".
        options: of `generate`, for the prior, which decides what is in the image; default 60 steps.
            `spacing="stage_c"` with 29 steps is the authors' faster choice. Those that begin with "decoder_",
            as `decoder_num_inference_steps`, are the decoder's; default 12 steps, a guidance scale of 1. Both
            stages take batch_size, devices, in_flight, on_step, on_x0, progress and compile_only.

    Raises:
        UnknownNameError, InvalidArgumentError: before a network is compiled.
    """
    one_of("output", output, OUTPUTS)
    prior, decoder = prior_stage(pipe), decoder_stage(pipe)
    size = cast(Size, tuple(TRAINED_SIZE[0] if side is None else side for side in (height, width)))
    size_of(decoder, prior.latent_shape(size)[:2])
    keys = D.image_keys(key, num_images_per_prompt * len(as_texts(prompt)))
    of_prior, of_decoder = (jax.vmap(jax.random.fold_in, (0, None))(keys, stage) for stage in (0, 1))
    texts = {"prompt": prompt, "negative_prompt": negative_prompt}
    texts["num_images_per_prompt"] = num_images_per_prompt
    prior_options, decoder_options = _of_each_stage(options)
    for name in (*texts, "image_embeddings", "output"):
        if name in decoder_options:
            raise InvalidArgumentError(f"decoder_{name} is no option of its own: write {name}=")
    scale = pipe.default_guidance_scale if guidance_scale is None else guidance_scale
    size = {"height": size[0], "width": size[1], "guidance_scale": scale}
    embeddings = prior(of_prior, **texts, **size, **prior_options)
    if output == "image_embeddings":
        return embeddings
    given = texts | {"image_embeddings": embeddings, "output": output}
    return decoder(of_decoder, **given, **decoder_options)


def _of_each_stage(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of the prior, and those of the decoder."""
    both = {name: value for name, value in options.items() if name in _OF_BOTH}
    decoder = {name: value for name, value in options.items() if name.startswith("decoder_")}
    prior = {name: value for name, value in options.items() if name not in decoder}
    return prior, both | {name.removeprefix("decoder_"): value for name, value in decoder.items()}


def check_both(pipe: Pipeline) -> None:
    """Every stage must fit itself, and the decoder the prior."""
    prior_stage(pipe).check_parts()
    decoder_stage(pipe).check_parts()
    drawn, taken = pipe.prior_prior.config.c_in, pipe.decoder.config.effnet_embd
    if drawn != taken:
        raise CheckpointError(
            f"its prior draws image embeddings of {drawn} channels, its decoder takes {taken}"
        )


def count_both(pipe: Pipeline, num_images: int, **options: Any) -> int:
    """The steps of both stages."""
    stages = zip((prior_stage(pipe), decoder_stage(pipe)), _of_each_stage(options), strict=True)
    return sum(stage.num_callbacks(num_images, **own) for stage, own in stages)


WUERSTCHEN = Family(
    name="Wuerstchen",
    folder=Folder(
        class_names=("WuerstchenCombinedPipeline",),
        parts=(
            *(f"prior_{name}" for name in WUERSTCHEN_PRIOR.folder.parts),
            *WUERSTCHEN_DECODER.folder.parts,
        ),
        check=check_both,
    ),
    defaults=lambda pipe: Defaults(guidance_scale=4.0, num_inference_steps=60),
    encode=encode,
    denoisers=("decoder",),
    autoencoder="vqgan",
    latent_spec=lambda pipe: decoder_latents(decoder_stage(pipe)),
    call=draw_both,
    num_callbacks=count_both,
    unused=(
        *(*_UNUSED, "latents", "denoising_start", "denoising_end", "previews", "true_cfg_scale"),
        "output_type",
    ),
    methods={"prior_stage": prior_stage, "decoder_stage": decoder_stage},
)
