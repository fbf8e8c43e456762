"""FLUX.2 (Black Forest Labs): a transformer on a flow, with states of three layers of a language model.

    pipe = pipelines.load("FLUX.2-klein-4B", dtype="bfloat16")
    images = pipe(key, "a red fox in the snow")
    images = pipe(key, "make it snow", image=photo)
    images = pipe(key, "the hat of the second picture on the fox", image=fox, further_images=[hat])

klein (2026) has Qwen3: the distilled models take 4 steps and no guidance, the base models 50 steps with
classifier-free guidance. dev (2025) has Mistral Small 3.2, and takes its guidance scale as an input, as it
was distilled. All look at pictures, whose tokens stand behind those of x, with a first coordinate of 10, 20
and so on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxldm import diffusion as D
from jaxldm.arguments import refuse
from jaxldm.errors import CheckpointError, DataError, InvalidArgumentError, shown
from jaxldm.pipelines.call import Call, Defaults, Request
from jaxldm.pipelines.embeds import TextWidths
from jaxldm.pipelines.families.flux import guidance_condition, is_guidance_distilled
from jaxldm.pipelines.families.flux_pictures import kontext_start
from jaxldm.pipelines.family import Family, Folder, check_text_width
from jaxldm.pipelines.generate import grid, read_call_inputs, read_scheduler
from jaxldm.pipelines.handed_in import latent_channels
from jaxldm.pipelines.inputs import (
    OF_A_START,
    InitialLatents,
    Inputs,
    LatentSpec,
    Size,
    read_inputs,
    taken_latents,
)
from jaxldm.pipelines.latents import scale_factor
from jaxldm.pipelines.pipeline import Pipeline
from jaxldm.pipelines.prompts import check_sequence_length, encode_texts

# What Qwen3's chat template comes to for one question that is answered without thinking.
TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
LAYERS = (9, 18, 27)  # of 36
# What the chat template of Mistral Small 3.2 comes to for a system message and one question. The message, its
# line break included, is the authors' (black-forest-labs/flux2, src/flux2/system_messages.py).
DEV_TEMPLATE = (
    "<s>[SYSTEM_PROMPT]You are an AI that reasons about image descriptions. You give structured responses "
    "focusing on object relationships, object\nattribution and actions without speculation.[/SYSTEM_PROMPT]"
    "[INST]{}[/INST]"
)
A_PICTURE = "[IMG]"  # Mistral's token, in whose place a picture would stand
DEV_LAYERS = (10, 20, 30)  # of 40
TRAINED_SIDE = 64  # latents


def encode(
    pipe: Pipeline,
    request: Request,
    *,
    max_sequence_length: int = 512,
    text_encoder_out_layers: Sequence[int] = LAYERS,
    further_images: Sequence[Any] = (),
) -> tuple[dict[str, Any], dict[str, Any]]:
    """States behind several layers of the text encoder, joined for each token.

    Texts are put to the encoder as a question in a chat. It does not look at what fills a row; the
    transformer does, as it was trained. Without a negative prompt guidance steers away from the empty text.

    Args:
        max_sequence_length: tokens of a text, the chat's own 12 or so among them.
        text_encoder_out_layers: behind which layers; 0 are the embeddings.
        further_images: of a call, see `read_pictures`.

    Raises:
        InvalidArgumentError: no room for a token, or more than the text encoder has places for; layers that
            it does not have, or of which the transformer takes another number.
    """
    layers = _checked_layers(pipe, max_sequence_length, text_encoder_out_layers)
    options = {"max_length": max_sequence_length, "layers": layers, "template": TEMPLATE}
    return request.both(lambda texts: _joined_states(pipe, texts, **options))


def encode_dev(
    pipe: Pipeline,
    request: Request,
    *,
    max_sequence_length: int = 512,
    text_encoder_out_layers: Sequence[int] = DEV_LAYERS,
    further_images: Sequence[Any] = (),
) -> tuple[dict[str, Any], dict[str, Any]]:
    """States behind several layers of the text encoder, joined for each token.

    Texts are put to Mistral as a question in a chat, behind the authors' system message. Rows are filled on
    the side that the tokenizer says, the left in the published folder; the text encoder does not look at what
    fills them, the transformer does. The token in whose place a picture would stand is left out of texts.

    Args:
        max_sequence_length: tokens of a text, the chat's own 40 or so among them.
        text_encoder_out_layers: behind which layers; 0 are the embeddings.
        further_images: of a call, see `read_pictures`.

    Raises:
        InvalidArgumentError: no room for a token, or more than the text encoder has places for; layers that
            it does not have, or of which the transformer takes another number.
    """
    layers = _checked_layers(pipe, max_sequence_length, text_encoder_out_layers)
    options = {"max_length": max_sequence_length, "layers": layers, "template": DEV_TEMPLATE}

    def states(texts: list[str]) -> dict[str, Any]:
        texts = [text.replace(A_PICTURE, "") for text in texts]
        return _joined_states(pipe, texts, special_tokens=False, **options)

    return request.both(states)


def _checked_layers(pipe: Pipeline, length: int, given: Sequence[int]) -> tuple[int, ...]:
    """The layers of a call, and its number of tokens, as the text encoder and the transformer have them."""
    encoder, config = pipe.text_encoder.config, pipe.transformer.config
    check_sequence_length(length, encoder.max_tokens)
    layers, count = tuple(given), config.joint_attention_dim // encoder.hidden_size
    last = encoder.num_hidden_layers
    if len(layers) != count or not all(0 <= layer <= last for layer in layers):
        raise InvalidArgumentError(
            f"text_encoder_out_layers must be {count} numbers from 0 to {last}, the layers of this text "
            f"encoder, got {shown(list(layers))}"
        )
    return layers


def _joined_states(pipe: Pipeline, texts: list[str], **options: Any) -> dict[str, Any]:
    encoded = encode_texts(pipe.text_encoder, pipe.tokenizer, texts, mask=True, **options)
    return {"encoder_hidden_states": encoded.hidden}


def empirical_mu(num_image_tokens: int, num_steps: int) -> float:
    """The logarithm of the shift for an image of so many tokens, drawn in so many steps.

    Linear in the number of steps, between lines in the number of tokens that were fitted for 10 and for 200
    steps; of more than 4300 tokens the line for 200. By the authors' own code.

    >>> round(empirical_mu(4096, 50), 4)
    2.0234
    """
    few = 8.73809524e-05 * num_image_tokens + 1.89833333
    many = 0.00016927 * num_image_tokens + 0.45666666
    if num_image_tokens > 4300:
        return many
    slope = (many - few) / 190.0
    return slope * num_steps + many - 200.0 * slope


def shifted_grid(pipe: Pipeline, call: Call, size: Size) -> tuple[Any, D.Grid]:
    """Evenly from pure noise; a scheduler that shifts by the size does so by `empirical_mu`."""
    scheduler = read_scheduler(pipe, call)
    if isinstance(scheduler.path, D.Flow) and scheduler.grid.spacing == "linspace":
        scheduler = scheduler.with_grid(spacing="trailing")
    shift = scheduler.dynamic_shift
    if shift is not None:
        mu = empirical_mu(pipe.num_image_tokens(size), _num_steps(pipe, call))
        constant = shift._replace(base_shift=mu, max_shift=mu)
        scheduler = dataclasses.replace(scheduler, dynamic_shift=constant)
    return grid(pipe, call, size, scheduler)


def _num_steps(pipe: Pipeline, call: Call) -> int:
    """Steps of a whole run. In diffusers noise levels that a call writes down count as 50."""
    if call.num_inference_steps is not None:
        return call.num_inference_steps
    if pipe.reference_quirks and call.sigmas is not None and not isinstance(call.sigmas, str):
        return 50
    for rows in (call.sigmas, call.timesteps):
        if rows is not None and not isinstance(rows, str):
            return len(np.asarray(rows).reshape(-1))
    return pipe.defaults.num_inference_steps


def latent_spec(pipe: Pipeline) -> LatentSpec:
    """1024x1024 pixels at the published factor of 16; `image` is a picture to look at, of any size."""
    factor, channels = scale_factor(pipe.vae), latent_channels(pipe.vae.config)
    side = TRAINED_SIDE * factor
    return LatentSpec((side, side), factor, factor, channels, image_factor=0)


def read_pictures(pipe: Pipeline, call: Call, num_images: int) -> Inputs:
    """`image`, and `further_images`: a list of pictures behind it, each as `image` is given, of any size.

    Raises:
        InvalidArgumentError: further pictures without a first, no list of them, or one that does not fit.
    """
    inputs = read_call_inputs(pipe, call, num_images)
    pictures = call.own.get("further_images", ())
    if not isinstance(pictures, (list, tuple)):
        raise refuse("further_images", "a list of pictures", pictures, "further_images=[picture]")
    if len(pictures) and call.image is None:
        raise InvalidArgumentError("further_images stand behind image: give the first picture as image")
    further = []
    for place, picture in enumerate(pictures):
        try:
            further.append(read_inputs(pipe.latent_spec, num_images, image=picture, resize=call.resize))
        except (InvalidArgumentError, DataError) as error:
            raise InvalidArgumentError(f"further_images[{place}]: {error}") from error
    return inputs._replace(further=tuple(further))


def initial_latents(pipe: Pipeline, call: Call, inputs: Inputs, num_images: int) -> InitialLatents:
    """The latents of the pictures, which may be of other sizes than x; or none."""
    start = kontext_start(pipe, call, inputs, num_images)
    if not inputs.further:
        return start
    pictures = (inputs, *inputs.further)
    return start._replace(
        reference=tuple(taken_latents(pipe.autoencoder, each, num_images) for each in pictures)
    )


def check_guidance(pipe: Pipeline, call: Call) -> None:
    """Raise `InvalidArgumentError` for a guidance scale of a distilled model, which was trained without."""
    if pipe.options["is_distilled"] and call.guidance_scale not in (None, 1):
        raise InvalidArgumentError(
            "this model is distilled (is_distilled in its model_index.json) and is drawn without guidance: "
            f"leave out guidance_scale, which is {call.guidance_scale}"
        )


def defaults(pipe: Pipeline) -> Defaults:
    """50 steps with guidance, or 4 without for a distilled model."""
    if pipe.options["is_distilled"]:
        return Defaults(guidance_scale=1.0, num_inference_steps=4)
    return Defaults(guidance_scale=4.0, num_inference_steps=50)


def check(pipe: Pipeline) -> None:
    """The texts' states and the latents must be as wide as the transformer takes them.

    Raises:
        CheckpointError: parts of different models.
    """
    if pipe.transformer.config.guidance_embeds:
        raise CheckpointError("its transformer takes the guidance as an input, as no FLUX.2 klein does")
    _check_widths(pipe)


def check_dev(pipe: Pipeline) -> None:
    """As klein, with a transformer that takes the guidance.

    Raises:
        CheckpointError: parts of different models.
    """
    if not pipe.transformer.config.guidance_embeds:
        raise CheckpointError("its transformer takes no guidance as an input, as FLUX.2-dev does")
    _check_widths(pipe)


def _check_widths(pipe: Pipeline) -> None:
    config, width = pipe.transformer.config, pipe.text_encoder.config.hidden_size
    if config.joint_attention_dim % width:
        check_text_width(pipe, width, config.joint_attention_dim)
    given, drawn = latent_channels(pipe.vae.config), config.out_channels or config.in_channels
    if not given == config.in_channels == drawn:
        raise CheckpointError(
            f"its autoencoder has {given} latent channels, its transformer takes {config.in_channels} and "
            f"draws {drawn}"
        )


FLUX2_KLEIN = Family(
    name="Flux2Klein",
    folder=Folder(
        class_names=("Flux2KleinPipeline",),
        parts=("transformer", "vae", "text_encoder", "tokenizer", "scheduler"),  # Qwen3-4B, or 8B
        options={"is_distilled": False},
        check=check,
    ),
    defaults=defaults,
    encode=encode,
    latent_spec=latent_spec,
    grid=shifted_grid,
    read_inputs=read_pictures,
    initial_latents=initial_latents,
    check_guidance=check_guidance,
    unused=OF_A_START,
    text_widths=lambda pipe: TextWidths(pipe.transformer.config.joint_attention_dim),
)
FLUX2 = FLUX2_KLEIN._replace(
    name="Flux2",
    folder=Folder(
        class_names=("Flux2Pipeline",),
        parts=FLUX2_KLEIN.folder.parts,  # Mistral Small 3.2
        check=check_dev,
    ),
    defaults=lambda pipe: Defaults(guidance_scale=4.0, num_inference_steps=50),
    encode=encode_dev,
    is_guidance_distilled=is_guidance_distilled,
    guidance_condition=guidance_condition,
    check_guidance=lambda pipe, call: None,
)
